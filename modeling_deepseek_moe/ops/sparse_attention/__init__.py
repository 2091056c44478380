"""Latent attention of each query over the latents that were chosen for it (DeepSeek-V3.2 report, section 2.1), absorbed."""

import torch
from torch import nn

from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._operands import (
    is_of_four_bits,
    kept_weight_of,
    operand_of,
    rows_of_rank,
    scale_of,
    summed_backward,
    unsupported_linear,
)
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit
from modeling_deepseek_moe.ops.sparse_attention import cpu, reference

__all__ = ["sparse_attention"]

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def sparse_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    indices: torch.Tensor,
    kv_b_proj: nn.Module,
    scaling: float,
) -> torch.Tensor:
    """`reference.sparse_attention`, with its arguments and result, on the backend that can.

    Args:
        kv_b_proj: the layer whose weight is W_UK and W_UV of one head after the other, ``[H·(n+v), r]``.
    """
    if rows_of_rank(kv_b_proj) is not None:
        c_kv = summed_backward(c_kv, kv_b_proj)
    tensors = q_nope, q_pe, c_kv, k_pe
    found = None if torch.is_autocast_enabled(q_nope.device.type) else _on_cpu(tensors, indices, kv_b_proj, scaling)
    if found is not None:
        return found
    heads, nope = q_nope.shape[1], q_nope.shape[3]
    weight = kept_weight_of(kv_b_proj, q_nope)
    w_uk, w_uv = weight.view(heads, -1, weight.shape[-1]).tensor_split((nope,), dim=1)
    return reference.sparse_attention(*tensors, indices, w_uk, w_uv, scaling)


def _on_cpu(tensors: Tensors, indices: torch.Tensor, kv_b_proj: nn.Module, scaling: float) -> torch.Tensor | None:
    """From the CPU engine, if it can."""
    if unsupported_linear(kv_b_proj) is not None:
        weight = kept_weight_of(kv_b_proj, tensors[0])
        if not may_use(CPU, cpu.unsupported_reason(*tensors, weight)):
            return None
        return cpu.attend(*tensors, indices, weight, None, scaling)
    operand = operand_of(kv_b_proj)
    if is_of_four_bits(kv_b_proj):
        reason = four_bit.unsupported_operand(*operand) or cpu.unsupported_reason(*tensors, *operand[1::-1])
        if not may_use(CPU, reason):
            return None
        parts, kind = four_bit.parts_of(operand.scales), operand.kind.removesuffix(NESTED)
        return cpu.attend_four_bit(*tensors, indices, operand.codes, parts, kind, scaling)
    if not may_use(CPU, cpu.unsupported_reason(*tensors, kv_b_proj.weight)):
        return None
    return cpu.attend(*tensors, indices, kv_b_proj.weight, scale_of(kv_b_proj), scaling)
