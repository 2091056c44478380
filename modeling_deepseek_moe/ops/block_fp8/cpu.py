"""Block-scaled FP8 on the CPU engine: blocks of 128 × 128, bytes used as they lie in the file."""

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops.linear.cpu import multiply

OUTPUTS = _native.ACTIVATIONS
unsupported_activations = _native.unsupported_activations
FP8_DTYPE = torch.float8_e4m3fn


def unsupported_blocks(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the engine cannot work on a ``weight`` in such blocks; ``None`` if it can."""
    reason = _native.unavailable_reason()
    if reason is None and block != (128, 128):
        reason = f"has blocks of 128 × 128 only, found {block}"
    if reason is None and weight.device.type != "cpu":
        reason = f"needs CPU tensors, found {weight.device}"
    return reason


def unsupported_weight(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the engine cannot use FP8 ``weight`` where it lies; ``None`` if it can."""
    reason = unsupported_blocks(weight, block)
    if reason is None and not weight.is_contiguous():
        reason = f"needs contiguous weights, found strides {weight.stride()}"
    return reason


def unsupported_values(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the engine cannot quantise ``weight``; ``None`` if it can."""
    reason = unsupported_blocks(weight, block)
    if reason is None and weight.dtype not in _native.ACTIVATIONS:
        reason = f"quantises {', '.join(str(dtype) for dtype in _native.ACTIVATIONS)}, found {weight.dtype}"
    return reason


def _linear(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply("FP8 linear", x, weight, scale_inv, bias, FP8_DTYPE)


linear = define(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale_inv, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, scale_inv, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


def _dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if weight.dtype != FP8_DTYPE or weight.ndim != 2:
        raise ValueError(f"FP8 dequantize: found a weight {_native.describe(weight)}, wanted a matrix in {FP8_DTYPE}")
    if dtype not in OUTPUTS:
        raise ValueError(f"FP8 dequantize: found {dtype}, wanted one of {', '.join(map(str, OUTPUTS))}")
    _native.check_scale("FP8 dequantize", weight, scale_inv)
    out = torch.empty(weight.shape, dtype=dtype)
    weight, scale_inv = weight.contiguous(), _native.fp32(scale_inv)
    _native.call(
        "dsm_dequantize",
        *(weight.data_ptr(), scale_inv.data_ptr(), *weight.shape, out.data_ptr(), _native.DTYPES[dtype]),
    )
    return out


dequantize = define(
    "fp8_dequantize(Tensor weight, Tensor scale_inv, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda weight, scale_inv, dtype: weight.new_empty(weight.shape, dtype=dtype),
)


def _quantize(weight: torch.Tensor, codes: bool, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if weight.ndim != 2 or weight.dtype not in _native.ACTIVATIONS:
        wanted = f"a matrix in {', '.join(map(str, _native.ACTIVATIONS))}"
        raise ValueError(f"FP8 quantize: found {_native.describe(weight)}, wanted {wanted}")
    weight = weight.contiguous()
    out, scale = _quantized_like(weight, codes, power_of_two)
    pointer = out.data_ptr() if codes else None
    try:
        _native.call(
            "dsm_quantize",
            *(weight.data_ptr(), _native.DTYPES[weight.dtype], *weight.shape, power_of_two, pointer, scale.data_ptr()),
        )
    except FloatingPointError:
        raise ValueError(
            f"found NaN or Inf (in fp32) in a weight {list(weight.shape)}, wanted finite values"
        ) from None
    return out, scale


def _quantized_like(weight: torch.Tensor, codes: bool, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    out = weight.new_empty((n, k) if codes else (0, k), dtype=FP8_DTYPE)
    return out, weight.new_empty((-(-n // 128), -(-k // 128)), dtype=torch.float32)


# Codes, none of them unless they are wanted, and scales.
quantize = define(
    "fp8_quantize(Tensor weight, bool codes, bool power_of_two) -> (Tensor, Tensor)", _quantize, _quantized_like
)
