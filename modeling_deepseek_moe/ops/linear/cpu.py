"""bf16 linear layers on the CPU engine: few tokens, or any number on CPUs without AVX-512; no gradients."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Matrix

FEW_TOKENS = 8  # above, torch's matrix product catches up


@torch.compiler.assume_constant_result
def torch_is_slow() -> bool:
    """Whether torch's bf16 products take several times as long as its fp32 ones: without AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def unsupported_reason(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why the engine should not run this layer; ``None`` if it should."""
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"needs CPU tensors, found {x.device} and {weight.device}"
    if x.dtype not in (torch.bfloat16, torch.float32) or torch.is_autocast_enabled("cpu"):
        return f"takes bf16 or fp32 activations outside of autocast, found {x.dtype}"
    if x.numel() > FEW_TOKENS * weight.shape[1] and not torch_is_slow():
        return f"is for up to {FEW_TOKENS} tokens, found {x.numel() // weight.shape[1]}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "computes no gradients"
    if not weight.is_contiguous():
        return f"needs contiguous weights, found strides {weight.stride()}"
    return _native.unavailable_reason()


def multiply(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x · Wᵀ + bias`` of a weight in ``dtype`` and its scales, checked before C reads them by address.

    Raises:
        ValueError: they do not fit each other.
    """
    if weight.ndim != 2 or weight.dtype != dtype:
        raise ValueError(f"{operation}: found a weight {_native.describe(weight)}, wanted a matrix in {dtype}")
    n, k = weight.shape
    if x.dtype not in _native.ACTIVATIONS or not x.ndim or x.shape[-1] != k:
        wanted = f"[..., {k}] in {', '.join(map(str, _native.ACTIVATIONS))}"
        raise ValueError(f"{operation}: found activations {_native.describe(x)}, wanted {wanted}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{operation}: found a bias {_native.describe(bias)}, wanted [{n}]")
    if scale_inv is not None:
        _native.check_scale(operation, weight, scale_inv)
        scale_inv = _native.fp32(scale_inv)
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else _native.fp32(bias)
    y = x.new_empty((*x.shape[:-1], n))
    _native.call(
        "dsm_linear",
        *(_native.DTYPES[x.dtype], x.data_ptr(), y.numel() // max(n, 1)),
        *(byref(Matrix.of(weight, scale_inv)), _native.pointer(bias), y.data_ptr()),
    )
    return y


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply("bf16 linear", x, weight, None, bias, torch.bfloat16)


linear = define(
    "bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
