"""RMSNorm: ``w · x / sqrt(mean(x²) + eps)`` over the last dimension, in fp32 whatever the input's dtype."""

import torch

from modeling_deepseek_moe.ops._dispatch import CPU, LIGER, TRITON, may_use, takes
from modeling_deepseek_moe.ops.rms_norm import cpu, liger, reference, triton

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x [..., D]``, ``weight [D]`` → ``[..., D]``; rounded to the dtype of ``x`` before the product with ``weight``."""
    if may_use(CPU, cpu.unsupported_reason(x, weight)):
        return cpu.rms_norm(x, weight, eps)
    if may_use(TRITON, triton.unsupported_reason(x, weight)):
        return triton.rms_norm(x, weight, eps)
    if takes(LIGER, "RMSNorm with gradients", lambda: liger.unsuitable(x, weight, eps)):
        return liger.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual``, both ``[..., D]``, and its RMSNorm."""
    if x.shape == residual.shape and may_use(TRITON, triton.unsupported_reason(x, weight, residual)):
        return triton.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return total, rms_norm(total, weight, eps)
