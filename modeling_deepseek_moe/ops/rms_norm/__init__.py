"""RMSNorm: ``w · x / sqrt(mean(x²) + eps)`` over the last dimension, in fp32 whatever the input's dtype."""

import torch

from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops.rms_norm import cpu, reference

__all__ = ["rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x [..., D]``, ``weight [D]`` → ``[..., D]``; rounded to the dtype of ``x`` before the product with ``weight``."""
    if may_use(CPU, cpu.unsupported_reason(x, weight)):
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)
