"""Linear layers with floating-point weights. The definition is ``torch.nn.functional.linear``.

torch reads bf16 weights at about half of the memory bandwidth while tokens are few; the CPU engine reads them at nearly
all of it. With many tokens torch is as fast on CPUs with AVX-512, and six times slower on those without.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._operands import is_four_bit, is_plain, operand_of, unsupported_linear
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit
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
    if is_four_bit(layer) and may_use(CPU, _unsupported_codes(layer, x)):
        kind, codes, scales = operand_of(layer)
        return four_bit.linear(x, codes, four_bit.parts_of(scales), None, kind.removesuffix(NESTED))
    # rows one after the other: bitsandbytes' 4-bit kernel for CPUs takes other strides for these
    return layer(x.contiguous())


def _unsupported_codes(layer: nn.Module, x: torch.Tensor) -> str | None:
    """Why the engine should not run bitsandbytes' ``Linear4bit`` on ``x``; ``None`` if it should."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32) or torch.is_autocast_enabled("cpu"):
        return f"takes bf16 or fp32 activations on the CPU outside of autocast, found {x.dtype} on {x.device}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "computes no gradients"
    return unsupported_linear(layer) or four_bit.unsupported_operand(*operand_of(layer))
