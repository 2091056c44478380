"""``diff A B``: two checkpoints, tensor by tensor and in how their configs say that codes are read: the same, or how far apart."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import torch

from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, TensorInfo
from modeling_deepseek_moe.conversion._source import Source, quantization_of

CHUNK = 1 << 22  # values compared at a time in fp64


class Difference(NamedTuple):
    """How one tensor differs. ``kind``: only in A, only in B, shape, dtype or values; or config, of a field of ``config.json``."""

    name: str
    kind: str
    detail: str


def differences(a: Source, b: Source) -> Iterator[Difference]:
    """Every tensor that is not the same in both, by name. Where dtypes differ the values are compared as well.

    Before them ``quantization_config``, field by field: it says what codes and scales stand for.
    """
    yield from _announced(a, b)
    for name in sorted(a.reader.keys() | b.reader.keys()):
        if name not in b.reader or name not in a.reader:
            yield Difference(name, f"only in {'A' if name in a.reader else 'B'}", "")
            continue
        one, two = a.reader[name], b.reader[name]
        if one.shape != two.shape:
            yield Difference(name, "shape", f"{list(one.shape)} and {list(two.shape)}")
            continue
        error = _error(a.read(one), b.read(two))
        if one.dtype != two.dtype:
            yield Difference(name, "dtype", f"{_dtype(one)} and {_dtype(two)}; {error or 'the same values'}")
        elif error:
            yield Difference(name, "values", error)


def _announced(a: Source, b: Source) -> Iterator[Difference]:
    one, two = (quantization_of(source.config) or {} for source in (a, b))
    if not isinstance(one, dict) or not isinstance(two, dict):
        one, two = {"": one}, {"": two}
    for field in sorted(one.keys() | two.keys()):
        if one.get(field) != two.get(field):
            found = " and ".join(json.dumps(fields[field]) if field in fields else "none" for fields in (one, two))
            yield Difference(f"quantization_config.{field}".rstrip("."), "config", found)


def _dtype(info: TensorInfo) -> str:
    return DTYPE_NAMES[info.dtype]


def _error(x: torch.Tensor, y: torch.Tensor) -> str:
    """Largest absolute and relative error in words; empty if every bit, or every value across dtypes, agrees."""
    x, y = x.reshape(-1), y.reshape(-1)
    if x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
        return ""
    largest = relative = 0.0
    differing = nan = 0
    for start in range(0, x.numel(), CHUNK):
        one, two = x[start : start + CHUNK].double(), y[start : start + CHUNK].double()
        nan += int((one.isnan() ^ two.isnan()).sum())
        apart = (one != two) & ~(one.isnan() & two.isnan())
        differing += int(apart.sum())
        gap = (one - two).abs().nan_to_num(0.0)[apart]
        if gap.numel():
            largest = max(largest, gap.max().item())
            scale = torch.maximum(one[apart].abs(), two[apart].abs()).nan_to_num(1.0)
            relative = max(relative, (gap / scale).nan_to_num(0.0).max().item())
    if not differing:
        return "" if x.dtype != y.dtype else "the same values, other bits (signs of zeros, or NaN)"
    return f"{differing:,} of {x.numel():,} values, max error {largest:.3g}, relative {relative:.3g}" + (
        f", NaN in one of them {nan:,} times" if nan else ""
    )
