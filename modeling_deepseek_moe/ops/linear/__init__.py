"""Linear layers with floating-point weights. The definition is ``torch.nn.functional.linear``.

torch reads bf16 weights at about half of the memory bandwidth while tokens are few; the CPU engine reads them at nearly
all of it. With many tokens torch is as fast on CPUs with AVX-512, and six times slower on those without.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._operands import is_plain
from modeling_deepseek_moe.ops.linear import cpu

__all__ = ["linear", "project"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., K] · Wᵀ + bias → [..., N]`` in the dtype of ``x``.

    fp32 activations take a bf16 ``weight [N, K]`` at its fp32 values; else both have one dtype.
    """
    if weight.dtype == torch.bfloat16 and may_use(CPU, cpu.unsupported_reason(x, weight, bias)):
        return cpu.linear(x, weight, bias)
    if x.dtype == torch.float32 and weight.dtype == torch.bfloat16:
        weight = weight.float()
    return F.linear(x, weight, bias)


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)``, by `linear` where the layer is ``torch.nn.Linear`` itself with nothing attached to its call.

    Every product of the model with a layer's weight goes through here, so that the layers need be nothing but torch's own;
    an adapter's, a quantiser's or a hooked layer is called as it is.
    """
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias)
    # rows one after the other: bitsandbytes' 4-bit kernel for CPUs takes other strides for these
    return layer(x.contiguous())
