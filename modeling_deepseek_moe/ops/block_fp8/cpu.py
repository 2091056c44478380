"""Block-scaled FP8 on the CPU engine: blocks of 128 × 128, bytes used as they lie in the file."""

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define

OUTPUTS = _native.ACTIVATIONS
refuses_activations = _native.refuses_activations
FP8 = _native.DTYPES[torch.float8_e4m3fn]


def refuses_blocks(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the engine cannot work on a ``weight`` in such blocks; ``None`` if it can."""
    reason = _native.refusal()
    if reason is None and block != (128, 128):
        reason = f"has blocks of 128 × 128 only, found {block}"
    if reason is None and weight.device.type != "cpu":
        reason = f"needs CPU tensors, found {weight.device}"
    return reason


def refuses_weight(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the engine cannot use FP8 ``weight`` where it lies; ``None`` if it can."""
    reason = refuses_blocks(weight, block)
    if reason is None and not weight.is_contiguous():
        reason = f"needs contiguous weights, found strides {weight.stride()}"
    return reason


def refuses_values(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the engine cannot quantise ``weight``; ``None`` if it can."""
    reason = refuses_blocks(weight, block)
    if reason is None and weight.dtype not in _native.ACTIVATIONS:
        reason = f"quantises {', '.join(str(dtype) for dtype in _native.ACTIVATIONS)}, found {weight.dtype}"
    return reason


def _linear(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    x, scale_inv = x.contiguous(), scale_inv.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    _native.call(
        "dsm_linear",
        *(_native.DTYPES[x.dtype], x.data_ptr(), x.numel() // max(k, 1)),
        *(FP8, weight.data_ptr(), scale_inv.data_ptr(), n, k, _native.pointer(bias), y.data_ptr()),
    )
    return y


linear = define(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale_inv, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, scale_inv, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


def _dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    scale_inv = scale_inv.float().contiguous()
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


def quantize(weight: torch.Tensor, codes: bool = True) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Codes (unless they are not wanted) and scales."""
    n, k = weight.shape
    weight = weight.contiguous()
    scale = torch.empty((-(-n // 128), -(-k // 128)), dtype=torch.float32)
    out = torch.empty((n, k), dtype=torch.float8_e4m3fn) if codes else None
    arguments = (weight.data_ptr(), _native.DTYPES[weight.dtype], n, k, _native.pointer(out), scale.data_ptr())
    try:
        _native.call("dsm_quantize", *arguments)
    except FloatingPointError:
        raise ValueError(f"found NaN or Inf (in fp32) in a weight {[n, k]}, wanted finite values") from None
    return out, scale
