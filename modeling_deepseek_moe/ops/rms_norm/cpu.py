"""RMSNorm on the CPU engine: one pass, where eight small torch operations cost more than the work."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Norm


def unsupported_reason(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the engine cannot norm ``x``; ``None`` if it can."""
    reason = _native.unsupported_activations(x)
    if reason is not None:
        return reason
    if weight.dtype != x.dtype or weight.device.type != "cpu":
        return f"needs weights like the activations, found {weight.dtype} on {weight.device}"
    if weight.shape != x.shape[-1:]:
        return f"needs a weight for each of {x.shape[-1:]}, found {weight.shape}"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "computes no gradients"
    return None


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype not in _native.ACTIVATIONS or weight.dtype != x.dtype or weight.shape != x.shape[-1:] or not x.ndim:
        found = f"{_native.describe(x)} and a weight {_native.describe(weight)}"
        raise ValueError(f"rms_norm: found {found}, wanted [..., D] and [D], both in one of {_native.ACTIVATIONS}")
    x, weight = x.contiguous(), weight.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    _native.call(
        "dsm_rms_norm",
        *(_native.DTYPES[x.dtype], x.data_ptr(), x.numel() // max(n, 1), n),
        *(byref(Norm(weight.data_ptr(), eps)), out.data_ptr()),
    )
    return out


rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: x.new_empty(x.shape),
)
