"""Four-bit linear layers on the CPU engine: codes and scales used as they lie in memory."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import NESTED, Matrix, Nested
from modeling_deepseek_moe.ops.four_bit.reference import KINDS, NESTED_GROUP, NestedScales

SCALE_DTYPES = {"int4": torch.bfloat16, "mxfp4": torch.float8_e8m0fnu, "nf4": torch.float32, "fp4": torch.float32}
OUTPUTS = _native.ACTIVATIONS
Scales = torch.Tensor | NestedScales


def unsupported_codes(kind: str, codes: torch.Tensor, scales: Scales, block: tuple[int, int]) -> str | None:
    """Why the engine cannot use a four-bit matrix where it lies; ``None`` if it can."""
    reason = _native.unavailable_reason()
    if reason is None and tuple(block) != (1, KINDS[kind].group):
        reason = f"has groups of {KINDS[kind].group} columns only for {kind}, found {tuple(block)}"
    for tensor in (codes, *(scales[:3] if isinstance(scales, NestedScales) else (scales,))):
        if reason is None and (tensor.device.type != "cpu" or not tensor.is_contiguous()):
            reason = f"needs contiguous codes and scales on the CPU, found {tensor.device}, strides {tensor.stride()}"
    if reason is None and isinstance(scales, torch.Tensor) and scales.dtype != SCALE_DTYPES[kind]:
        reason = f"takes scales of {kind} in {SCALE_DTYPES[kind]}, found {scales.dtype}"
    return reason


def unsupported_operand(kind: str, codes: torch.Tensor, scales: Scales) -> str | None:
    """`unsupported_codes` of one of `_structs.FOUR_BIT` in the engine's own groups."""
    name = kind.removesuffix(NESTED)
    return unsupported_codes(name, codes, scales, (1, KINDS[name].group))


def matrix(operation: str, kind: str, codes: torch.Tensor, scales: Scales) -> tuple[Matrix, list]:
    """A matrix for C, and what has to live as long as it.

    Raises:
        ValueError: codes and scales do not fit each other.
    """
    inner = scales.codes if isinstance(scales, NestedScales) else scales
    group = KINDS[kind].group if kind in KINDS else 1
    columns = 2 * codes.shape[-1] * codes.itemsize
    fits = (
        kind in KINDS
        and codes.ndim == 2
        and columns % group == 0
        and tuple(inner.shape) == (codes.shape[0], columns // group)
        and (_fit(scales, group) if isinstance(scales, NestedScales) else scales.dtype == SCALE_DTYPES[kind])
    )
    if not fits:
        found = f"{kind} codes {_native.describe(codes)} and scales {_native.describe(inner)}"
        raise ValueError(f"{operation}: found {found}, wanted a scale for each group of {group} columns of a row")
    codes = codes.contiguous()
    if isinstance(scales, NestedScales):
        parts = NestedScales(*(part.contiguous() for part in scales))
        record = Nested.of(parts)
        return Matrix.of_four_bit(kind + NESTED, codes, record), [codes, parts, record]
    scales = scales.contiguous()
    return Matrix.of_four_bit(kind, codes, scales), [codes, scales]


def _fit(scales: NestedScales, group: int) -> bool:
    """Whether nested scales are the parts that C reads."""
    parts = scales.absmax, scales.table, scales.offset
    wanted = (-(-scales.codes.numel() // NESTED_GROUP),), (256,), ()
    fits = all(part.dtype == torch.float32 and part.shape == shape for part, shape in zip(parts, wanted, strict=True))
    return fits and group == 64 and scales.codes.dtype == torch.uint8


def scales_of(parts: list[torch.Tensor]) -> Scales:
    """The inverse of `parts_of`."""
    return parts[0] if len(parts) == 1 else NestedScales(*parts)


def parts_of(scales: Scales) -> list[torch.Tensor]:
    """Scales as an operator takes them: one tensor, or the four of nested ones."""
    return list(scales) if isinstance(scales, NestedScales) else [scales]


def _linear(
    x: torch.Tensor, codes: torch.Tensor, scales: list[torch.Tensor], bias: torch.Tensor | None, kind: str
) -> torch.Tensor:
    weight, kept = matrix("four-bit linear", kind, codes, scales_of(scales))
    if x.dtype not in _native.ACTIVATIONS or not x.ndim or x.shape[-1] != weight.cols:
        wanted = f"[..., {weight.cols}] in {', '.join(map(str, _native.ACTIVATIONS))}"
        raise ValueError(f"four-bit linear: found activations {_native.describe(x)}, wanted {wanted}")
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"four-bit linear: found a bias {_native.describe(bias)}, wanted [{weight.rows}]")
    x, bias = x.contiguous(), None if bias is None else _native.fp32(bias)
    y = x.new_empty((*x.shape[:-1], weight.rows))
    _native.call(
        "dsm_linear",
        *(_native.DTYPES[x.dtype], x.data_ptr(), y.numel() // max(weight.rows, 1)),
        *(byref(weight), _native.pointer(bias), y.data_ptr()),
    )
    del kept
    return y


# x [..., K] · Wᵀ + bias → [..., N] of codes [N, ·] and `parts_of` their scales.
linear = define(
    "four_bit_linear(Tensor x, Tensor codes, Tensor[] scales, Tensor? bias, str kind) -> Tensor",
    _linear,
    lambda x, codes, scales, bias, kind: x.new_empty((*x.shape[:-1], codes.shape[0])),
)


def _dequantize(codes: torch.Tensor, scales: list[torch.Tensor], dtype: torch.dtype, kind: str) -> torch.Tensor:
    weight, kept = matrix("four-bit dequantize", kind, codes, scales_of(scales))
    if dtype not in OUTPUTS:
        raise ValueError(f"four-bit dequantize: found {dtype}, wanted one of {', '.join(map(str, OUTPUTS))}")
    out = torch.empty((weight.rows, weight.cols), dtype=dtype)
    _native.call("dsm_dequantize_four_bit", byref(weight), out.data_ptr(), _native.DTYPES[dtype])
    del kept
    return out


# The weight [N, K] in a dtype, rounded once from the fp32 product.
dequantize = define(
    "four_bit_dequantize(Tensor codes, Tensor[] scales, ScalarType dtype, str kind) -> Tensor",
    _dequantize,
    lambda codes, scales, dtype, kind: codes.new_empty(
        (codes.shape[0], 2 * codes.shape[1] * codes.itemsize), dtype=dtype
    ),
)
