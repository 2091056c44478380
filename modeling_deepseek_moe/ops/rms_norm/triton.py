"""RMSNorm on a GPU, alone or after a residual's sum, in one kernel."""

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import kernels, launch

MOST_FEATURES = 1 << 14  # a row is held in registers


def unsupported_reason(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Why the kernel cannot norm ``x``, or its sum with a residual; ``None`` if it can."""
    if not x.ndim or weight.shape != x.shape[-1:] or x.shape[-1] > MOST_FEATURES:
        return f"is for up to {MOST_FEATURES} features, with a weight for each, found {x.shape} and {weight.shape}"
    tensors = (x, weight) if residual is None else (x, weight, residual)
    return _triton.unsupported_reason(*tensors) or _triton.unsupported_floats(*tensors)


def _run(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
    features = x.shape[-1]
    if weight.shape != (features,) or (residual is not None and residual.shape != x.shape):
        found = f"{list(x.shape)}, {None if residual is None else list(residual.shape)} and {list(weight.shape)}"
        raise ValueError(f"rms_norm: found x, residual and weight {found}, wanted [..., D], [..., D] and [D]")
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x) if residual is not None else None
    launch(
        kernels("rms_norm").rms_norm,
        (x.numel() // max(features, 1),),
        x.device,
        *(x, residual, weight, total, out, features, eps, features, features),
        **dict(DP=_triton.padded(features), ADD=residual is not None, warps=8 if features > 2048 else 4),
    )
    return total, out


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _run(x, None, weight, eps)[1]


def _add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    return _run(x, residual, weight, eps)


rms_norm = define(
    "triton_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    None,
    lambda x, weight, eps: x.new_empty(x.shape),
    _rms_norm,
)
# x + residual, and its RMSNorm.
add_rms_norm = define(
    "triton_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    None,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    _add_rms_norm,
)
