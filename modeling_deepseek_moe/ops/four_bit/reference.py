"""What four-bit weights are, by definition. Legend: N output features, K input features, G groups of a row."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

NESTED_GROUP = 256  # scales that share one of their own, counted over the whole matrix


class Kind(NamedTuple):
    """A four-bit code: what its sixteen values are and how two of them share a byte."""

    values: tuple[float, ...]
    low_first: bool
    group: int


class NestedScales(NamedTuple):
    """Scales ``[N, G]`` that are codes themselves: table[code] · absmax[i // 256] + offset, i counts them row by row."""

    codes: torch.Tensor  # uint8 [N, G]
    absmax: torch.Tensor  # fp32 [⌈N·G / 256⌉]
    table: torch.Tensor  # fp32 [256]
    offset: torch.Tensor  # fp32 []


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4 = Kind(tuple(float(code - 8) for code in range(16)), True, 32)
MXFP4 = Kind(E2M1 + tuple(-value for value in E2M1), True, 32)
# quantiles of the normal distribution (QLoRA, arXiv:2305.14314), as bitsandbytes has them
NF4 = Kind(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    False,
    64,
)
_FP4 = tuple(torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]).div(12.0).tolist())
FP4 = Kind(_FP4 + tuple(0.0 - value for value in _FP4), False, 64)  # without a zero below zero
KINDS = {"int4": INT4, "mxfp4": MXFP4, "nf4": NF4, "fp4": FP4}


def plain(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; bytes are the exponents of E8M0."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, kind: Kind) -> torch.Tensor:
    """Codes of N rows and fp32 scales ``[N, G]`` → ``[N, K]``."""
    n, groups = scales.shape
    packed = codes.contiguous().view(torch.uint8).reshape(-1)
    values = _pairs(kind, codes.device).index_select(0, packed.int()).view(n, groups, -1)
    return values.mul_(scales.unsqueeze(-1)).view(n, -1).to(dtype)


def _pairs(kind: Kind, device: torch.device) -> torch.Tensor:
    """``[256, 2]``: what each byte stands for."""
    values = torch.tensor(kind.values, dtype=torch.float32, device=device)
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack((low, high) if kind.low_first else (high, low), dim=1)


def _pack(codes: torch.Tensor, low_first: bool) -> torch.Tensor:
    """``[N, K]`` codes → ``[N, K/2]`` bytes."""
    codes = codes.to(torch.uint8)
    first, second = codes[:, ::2], codes[:, 1::2]
    return first | (second << 4) if low_first else (first << 4) | second


def encode_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = amax / 7.5 in bf16, code = round(w / scale) + 8 within 0 to 15; eight codes to an int32.

    Computed in the weight's dtype, as compressed-tensors does; a group of zeros has the scale 1.
    """
    groups = weight.unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (groups / scales.unsqueeze(-1)).round().clamp(-8, 7).flatten(1).to(torch.int8) + 8
    return _pack(codes, INT4.low_first).view(torch.int32), scales


def encode_mxfp4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = 2^(⌊log2 amax⌋ - 2), elements to the nearest E2M1, ties to even, at most 6; a group of zeros has 1."""
    groups = weight.float().unflatten(1, (-1, group))
    amax = groups.abs().amax(-1)
    exponents = (torch.frexp(amax).exponent - 3).clamp(-127, 127)
    exponents = torch.where(amax > 0, exponents, 0)
    scales = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    # exact: by powers of two, in two steps, since 2^127 and 2^-127 have no inverse among normal numbers
    half = exponents.div(2, rounding_mode="floor")
    scaled = torch.ldexp(torch.ldexp(groups, -half.unsqueeze(-1)), (half - exponents).unsqueeze(-1)).flatten(1)
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=weight.device)
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros(()))  # a tie there goes up, to the even code
    codes = torch.bucketize(scaled.abs(), bounds, out_int32=True) + 8 * torch.signbit(scaled)
    return _pack(codes, MXFP4.low_first), scales


def encode_by_table(weight: torch.Tensor, group: int, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = amax in fp32, code = the table's nearest to w / amax, as bitsandbytes computes it."""
    groups = weight.float().unflatten(1, (-1, group))
    scales = groups.abs().amax(-1)
    scaled = torch.clamp(groups * (1.0 / scales.clamp(min=1e-38).unsqueeze(-1)), -1, 1).flatten(1)
    table = torch.tensor(kind.values, device=weight.device)
    order = torch.argsort(table)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    codes = order.to(torch.uint8)[torch.bucketize(scaled, bounds, out_int32=True)]
    return _pack(codes, kind.low_first), scales


def encode_with(weight: torch.Tensor, scales: torch.Tensor, group: int, kind: Kind) -> torch.Tensor:
    """The codes whose values, times fp32 scales ``[N, G]``, are nearest."""
    scaled = (weight.float().unflatten(1, (-1, group)) / scales.unsqueeze(-1)).flatten(1)
    table = torch.tensor(kind.values, device=weight.device)
    order = torch.argsort(table)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    return _pack(order.to(torch.uint8)[torch.bucketize(scaled, bounds, out_int32=True)], kind.low_first)


ENCODERS: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]] = {
    "int4": encode_int4,
    "mxfp4": encode_mxfp4,
    "nf4": partial(encode_by_table, kind=NF4),
    "fp4": partial(encode_by_table, kind=FP4),
}


def expand(scales: NestedScales) -> torch.Tensor:
    """``[N, G]`` fp32."""
    codes, absmax, table, offset = scales
    values = table.index_select(0, codes.reshape(-1).int())
    each = absmax.repeat_interleave(NESTED_GROUP)[: len(values)]
    return (values * each + offset).view(codes.shape)


def nest(scales: torch.Tensor) -> NestedScales:
    """Scales less their mean, in runs of 256 with their largest as a scale.

    bitsandbytes' CPU code looks the nearest of the 256 values up on a grid of 65536 steps over [-1, 1], which its CUDA
    code does not: the codes of values near a middle differ by one.
    """
    offset = scales.mean()
    values = (scales - offset).reshape(-1)
    runs = torch.nn.functional.pad(values, (0, -len(values) % NESTED_GROUP)).view(-1, NESTED_GROUP)
    absmax = runs.abs().amax(-1)
    table = nested_table().to(scales.device)
    grid = torch.arange(1 << 16, device=scales.device) / 32767.5 - 1
    nearest = torch.bucketize(grid, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    steps = ((runs / absmax.unsqueeze(-1) + 1) * 32767.5 + 0.5).floor()
    steps = torch.where(absmax.unsqueeze(-1) > 0, steps, 0).long().view(-1)[: len(values)]
    return NestedScales(nearest[steps].view(scales.shape), absmax, table, offset)


def renest(values: torch.Tensor, scales: NestedScales, changed: torch.Tensor) -> NestedScales:
    """``scales`` with new values ``[N, G]`` where ``changed [N, G]``; all others keep their codes.

    The offset stays, and so does the scale of a run of 256, unless a new value lies beyond it: then all of that run get codes.
    """
    offsets, own = (values - scales.offset).reshape(-1), scales.codes.reshape(-1)
    runs = torch.nn.functional.pad(offsets, (0, -len(offsets) % NESTED_GROUP)).view(-1, NESTED_GROUP)
    touched = torch.nn.functional.pad(changed.reshape(-1), (0, -len(offsets) % NESTED_GROUP)).view(-1, NESTED_GROUP)
    largest = torch.where(touched, runs.abs(), 0).amax(-1)
    grows = largest > scales.absmax
    absmax = torch.where(grows, largest, scales.absmax)
    middles = (scales.table[:-1] + scales.table[1:]) / 2
    nearest = torch.bucketize(runs / absmax.unsqueeze(-1), middles, out_int32=True).to(torch.uint8)
    codes = torch.where((touched | grows.unsqueeze(-1)).view(-1)[: len(own)], nearest.view(-1)[: len(own)], own)
    return scales._replace(codes=codes.view(scales.codes.shape), absmax=absmax)


def nested_table() -> torch.Tensor:
    """The dynamic 8-bit type (arXiv:1511.04561): a sign, leading zeros for the exponent, the rest a fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [*means, *(-mean for mean in means)]
    return torch.tensor(sorted(values), dtype=torch.float32)
