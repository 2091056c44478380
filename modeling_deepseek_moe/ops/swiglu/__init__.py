"""SwiGLU: ``down(act(gate(x)) · up(x))``, of dense layers and shared experts."""

import torch
from torch import nn

from modeling_deepseek_moe.ops import experts
from modeling_deepseek_moe.ops._dispatch import CPU, LIGER, TRITON, may_use, takes
from modeling_deepseek_moe.ops._operands import is_of_four_bits, operand_of, scale_of, unsupported_linear
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.block_fp8 import triton as fp8
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit
from modeling_deepseek_moe.ops.linear import project
from modeling_deepseek_moe.ops.swiglu import liger, triton

__all__ = ["swiglu", "unsupported_reason"]


def swiglu(
    x: torch.Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
) -> torch.Tensor:
    """``x [..., D] → [..., D]``: in one call of the engine where that can read the three weights, which it does once."""
    layers = (gate_proj, up_proj, down_proj)
    if all(map(is_of_four_bits, layers)):
        if may_use(CPU, _unsupported_four_bit(x, *layers, act_fn)):
            operands = [operand_of(layer) for layer in layers]
            scales = [part for operand in operands for part in four_bit.parts_of(operand.scales)]
            kind = operands[0].kind.removesuffix(NESTED)
            return experts.cpu.swiglu_four_bit(x, [operand.codes for operand in operands], scales, kind)
    elif may_use(CPU, unsupported_reason(x, *layers, act_fn)):
        return experts.cpu.swiglu(x, *(layer.weight for layer in layers), *(scale_of(layer) for layer in layers))
    if may_use(TRITON, _unsupported_codes(x, gate_proj, up_proj, act_fn)):
        return project(down_proj, fp8.gate_up(x, *_codes(gate_proj), *_codes(up_proj)))
    gate, up = project(gate_proj, x), project(up_proj, x)
    if experts.cpu.is_silu(act_fn) and may_use(TRITON, triton.unsupported_reason(gate, up)):
        return project(down_proj, triton.activate(gate, up))
    if experts.cpu.is_silu(act_fn) and takes(LIGER, "SwiGLU with gradients", lambda: liger.unsuitable(gate, up)):
        return project(down_proj, liger.activate(gate, up))
    return project(down_proj, act_fn(gate) * up)


def _codes(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.weight, scale_of(layer)


def _unsupported_codes(x: torch.Tensor, gate_proj: nn.Module, up_proj: nn.Module, act_fn: nn.Module) -> str | None:
    """Why gate and up, both FP8, cannot be multiplied with few rows in one kernel; ``None`` if they can."""
    layers = gate_proj, up_proj
    reason = next(filter(None, map(unsupported_linear, layers)), None)
    if reason is None and any(layer.weight.dtype != fp8.FP8_DTYPE for layer in layers):
        reason = "takes FP8 codes"
    if reason is None and gate_proj.weight.shape != up_proj.weight.shape:
        reason = "needs gate and up of one shape"
    if reason is None and not experts.cpu.is_silu(act_fn):
        reason = f"has silu for its activation function, found {type(act_fn).__name__}"
    if reason is None and x.numel() > fp8.FEW_ROWS * x.shape[-1]:
        reason = f"is for up to {fp8.FEW_ROWS} rows, found {x.numel() // x.shape[-1]}"
    if reason is None and torch.is_grad_enabled() and x.requires_grad:
        reason = "computes no gradients"
    return reason or next(
        filter(None, (fp8.unsupported_linear(x, layer.weight, (128, 128)) for layer in layers)), None
    )


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


def _unsupported_four_bit(
    x: torch.Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
) -> str | None:
    """As `unsupported_reason`, of weights that are codes of four bits."""
    layers = (gate_proj, up_proj, down_proj)
    for layer in layers:
        reason = unsupported_linear(layer) or four_bit.unsupported_operand(*operand_of(layer))
        if reason is not None:
            return reason
    if len({operand_of(layer).kind for layer in layers}) > 1:
        return "needs weights of one format"
    if torch.is_autocast_enabled("cpu"):
        return "does not run under autocast"
    return experts.cpu.unsupported_reason(x, act_fn)
