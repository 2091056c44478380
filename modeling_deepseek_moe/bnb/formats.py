"""What a config says of weights that transformers' own quantiser loads, bitsandbytes': their row, and which modules have codes.

For sizes and names. `formats.of_config` answers for the formats that this package loads itself, and refuses these.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.formats import MAX_BLOCK, announcements
from modeling_deepseek_moe.formats.row import Scales, WeightFormat
from modeling_deepseek_moe.ops.four_bit import NESTED_GROUP, NestedScales, expand
from modeling_deepseek_moe.ops.quantized_linear import quantized_linear

METHOD = "bitsandbytes"
STORAGE = "bnb_4bit_quant_storage"  # the dtype that the bytes of 4-bit codes are viewed as
BLOCK = 64  # values that share a scale, row by row through a matrix
UNLESS_SAID = ("lm_head",)  # what bitsandbytes leaves alone where no skip list is given
# Linear layers that releases keep in floating point: of an MTP layer, and the head.
WIDE = (".eh_proj.weight", ".shared_head.head.weight", "lm_head.weight")
# What its modules write next to a weight, or next to the name of their own.
PARTS = re.compile(r"^(.*\.weight)(\.(?:nested_)?(?:absmax|quant_map)|\.quant_state\.bitsandbytes__\w+)$")
ROW_PARTS = re.compile(r"^(.*)(\.SCB|\.weight_format)$")


def _encode_rows(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[N, K]`` and the largest value of each row ``[N]``, by bitsandbytes, which rounds the weight to fp16 first."""
    from bitsandbytes.functional import int8_vectorwise_quant

    return int8_vectorwise_quant(weight.to(torch.float16))[:2]


def _decode_rows(
    codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """int8 rows in ``dtype``: ``codes · absmax / 127``."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(codes, absmax).to(dtype)


def _renew_rows(
    codes: torch.Tensor, absmax: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `WeightFormat.requantize`: rows of int8 that changed, whole ones; ``changed [N, 1]``."""
    changed = (weight != _decode_rows(codes, absmax, weight.dtype)).any(1)
    rows = weight[changed]
    if not torch.isfinite(rows.half()).all():
        raise ValueError(
            "found NaN, Inf or values beyond fp16, which bitsandbytes rounds weights to, wanted finite ones"
        )
    new, new_absmax = codes.clone(), absmax.clone()
    if len(rows):
        new[changed], new_absmax[changed] = _encode_rows(rows, INT8.block)
    return new, new_absmax, changed.unsqueeze(1)


# Of ``Linear8bitLt``. No row of `formats.FORMATS`: its scales have one dimension, and nothing but bitsandbytes reads or writes it.
INT8 = WeightFormat(
    name="int8",
    method=METHOD,
    fields={"load_in_8bit": True},
    implied={},
    code_dtype=torch.int8,
    bits=8,
    block=(1, MAX_BLOCK),
    scale_dtype=torch.float32,
    scale_suffix=".SCB",
    encode=_encode_rows,
    decode=_decode_rows,
    renew=_renew_rows,
    foreign=True,
)


def quant_state(kind: str, codes: torch.Tensor, scales: Scales, dtype: torch.dtype):
    """The ``bitsandbytes.functional.QuantState`` of a matrix in ``nf4`` or ``fp4``, whose weight is read in ``dtype``.

    Args:
        codes: ``[N, K/2]``.
        scales: in any shape.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type

    inner = scales.codes if isinstance(scales, NestedScales) else scales
    state = QuantState(
        absmax=inner.reshape(-1),
        shape=torch.Size((len(codes), codes.shape[1] * 2)),
        code=get_4bit_type(kind, device=codes.device),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dtype,
    )
    if isinstance(scales, NestedScales):
        state.offset, state.nested = scales.offset, True
        state.state2 = QuantState(absmax=scales.absmax, code=scales.table, blocksize=NESTED_GROUP, dtype=torch.float32)
    return state


def multiply(kind: str, x: torch.Tensor, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
    """``x · Wᵀ`` in the dtype of ``x`` and differentiable in it, by bitsandbytes; see `dequantize` for rows of no whole blocks."""
    if x.shape[-1] % BLOCK:
        plain = expand(scales) if isinstance(scales, NestedScales) else scales
        return quantized_linear(x, codes, plain.view(1, -1), None, len(codes), partial(dequantize, kind))
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, codes.view(-1, 1), quant_state=quant_state(kind, codes, scales, x.dtype))


def dequantize(kind: str, codes: torch.Tensor, scales: Scales, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[N, K]`` in ``dtype``, by bitsandbytes.

    As one long row: bitsandbytes 0.50's code for AVX-512 takes each row's first block for the start of a scale, which is wrong
    where blocks go on in the next row.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = quant_state(kind, codes, scales, dtype)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return dequantize_4bit(codes.view(-1, 1), state).view(shape)


def ragged(row: WeightFormat) -> WeightFormat:
    """``nf4`` or ``fp4`` for matrices whose blocks go on in the next row, by bitsandbytes alone; scales have one dimension."""
    name = row.name
    decode, renew = partial(_ragged_decode, name), partial(_ragged_renew, name)
    return replace(row, kernel=None, linear=partial(_ragged_linear, name), decode=decode, renew=renew)


def _ragged_linear(
    kind: str, x: torch.Tensor, codes: torch.Tensor, scales: Scales, bias: torch.Tensor | None, block
) -> torch.Tensor:
    product = multiply(kind, x, codes, scales)
    return product if bias is None else product + bias


def _ragged_decode(kind: str, codes: torch.Tensor, scales: Scales, dtype: torch.dtype, block) -> torch.Tensor:
    return dequantize(kind, codes, scales, dtype)


def _ragged_renew(
    kind: str, codes: torch.Tensor, scales: Scales, weight: torch.Tensor
) -> tuple[torch.Tensor, Scales, torch.Tensor]:
    """As `WeightFormat.requantize`: a block of 64 is a row here, and ``changed [blocks]`` counts them through the matrix."""
    row, beyond = formats.by_name(kind), -weight.numel() % BLOCK
    zeros = row.quantize(torch.zeros(1, BLOCK, device=codes.device))[0].view(-1)
    lines = torch.cat((codes.reshape(-1), zeros[: beyond // 2])).view(-1, BLOCK // 2)
    inner, shape = _shaped(scales, (-1, 1)), (scales.codes if isinstance(scales, NestedScales) else scales).shape
    apart = torch.nn.functional.pad((weight != dequantize(kind, codes, scales, weight.dtype)).view(-1), (0, beyond))
    wanted = torch.nn.functional.pad(weight.reshape(-1), (0, beyond)).view(-1, BLOCK)
    # the row's own values where nothing changed: bitsandbytes' may differ from them in their last bit
    wanted = torch.where(
        apart.view(-1, BLOCK).any(1, keepdim=True), wanted, row.dequantize(lines, inner, weight.dtype)
    )
    new, made, changed = row.requantize(lines, inner, wanted)
    return new.view(-1)[: codes.numel()].view(codes.shape), _shaped(made, shape), changed.view(-1)


def _shaped(scales: Scales, shape: tuple[int, ...]) -> Scales:
    if isinstance(scales, NestedScales):
        return scales._replace(codes=scales.codes.reshape(shape))
    return scales.reshape(shape)


def is_bitsandbytes(fields: Mapping | None) -> bool:
    """Whether a ``quantization_config`` is bitsandbytes'."""
    method = (fields or {}).get("quant_method")
    return getattr(method, "value", method) == METHOD


def check_storage(fields: Mapping | None) -> None:
    """
    Raises:
        ValueError: files in which bitsandbytes' 4-bit codes lie in another dtype than bytes'.
    """
    fields = fields or {}
    storage = fields.get(STORAGE) or "uint8"
    if storage != "uint8" and is_bitsandbytes(fields) and not fields.get("load_in_8bit"):
        raise ValueError(
            f"quantization_config: {STORAGE}={storage!r} is not supported in files, only 'uint8': the model loads, and what it saves "
            "after model.dequantize() every command takes"
        )


def announced(fields: Mapping | None) -> tuple[WeightFormat, ...]:
    """As `formats.all_of_config`, or the row of bitsandbytes' weights; nested scales are a byte in it, and theirs are left out.

    Raises:
        ValueError: no row has it.
    """
    if fields is None or not is_bitsandbytes(fields):
        return formats.all_of_config(fields)
    if fields.get("load_in_8bit"):
        return (INT8,)
    row = replace(formats.by_name(fields.get("bnb_4bit_quant_type") or "fp4"), whole_groups=False)
    return (replace(row, scale_dtype=torch.uint8) if fields.get("bnb_4bit_use_double_quant") else row,)


def scheme_of(fields: Mapping | None) -> Callable[[str], int | None]:
    """As `announcements.scheme_of`, of bitsandbytes' weights too: ``None`` for a module that keeps floating-point ones."""
    if fields is None or not is_bitsandbytes(fields):
        return announcements.scheme_of(fields)
    said = fields.get("llm_int8_skip_modules")
    skipped = list(UNLESS_SAID if said is None else said)
    return lambda module: 0 if should_convert_module(module, skipped) else None


def has_codes(fields: Mapping | None, name: str, quantized: bool) -> bool:
    """Whether a weight of a release is of those that are codes, ``quantized`` where this package's formats have them."""
    return quantized or (is_bitsandbytes(fields) and name.endswith(WIDE))


def split_part(name: str) -> tuple[str, str | None]:
    """As `formats.split_scale`, for what bitsandbytes writes: ``….SCB`` → ``….weight`` and the suffix."""
    found = PARTS.match(name)
    if found:
        return found[1], found[2]
    found = ROW_PARTS.match(name)
    return (f"{found[1]}.weight", found[2]) if found else formats.split_scale(name)
