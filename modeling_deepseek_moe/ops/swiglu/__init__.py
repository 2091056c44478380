"""SwiGLU: ``down(act(gate(x)) · up(x))``, of dense layers and shared experts."""

import torch
from torch import nn

from modeling_deepseek_moe.ops import experts
from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._operands import scale_of, unsupported_linear
from modeling_deepseek_moe.ops.linear import project

__all__ = ["swiglu", "unsupported_reason"]


def swiglu(
    x: torch.Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
) -> torch.Tensor:
    """``x [..., D] → [..., D]``: in one call of the engine where that can read the three weights, which it does once."""
    layers = (gate_proj, up_proj, down_proj)
    if may_use(CPU, unsupported_reason(x, *layers, act_fn)):
        return experts.cpu.swiglu(x, *(layer.weight for layer in layers), *(scale_of(layer) for layer in layers))
    return project(down_proj, act_fn(project(gate_proj, x)) * project(up_proj, x))


def unsupported_reason(
    x: torch.Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
) -> str | None:
    """Why the CPU engine cannot run the layer in one call; ``None`` if it can."""
    layers = (gate_proj, up_proj, down_proj)
    for layer in layers:
        reason = unsupported_linear(layer)
        if reason is not None:
            return reason
    if len({layer.weight.dtype for layer in layers}) > 1:
        return "needs weights of one dtype"
    if torch.is_autocast_enabled("cpu"):
        return "does not run under autocast"
    return experts.cpu.unsupported_reason(x, act_fn, *(layer.weight for layer in layers))
