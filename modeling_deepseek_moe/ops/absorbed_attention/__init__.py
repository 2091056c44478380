"""Latent attention over the latents themselves (DeepSeek-V2 report, section 2.1): nothing is expanded.

q̃ = W_UKᵀ q_nope;  p = softmax((c_kv q̃ + k_pe q_pe) · scaling + mask);  o = W_UV (p c_kv), head by head.
"""

import torch
from torch import nn

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._dispatch import CPU, TRITON, may_use
from modeling_deepseek_moe.ops._operands import (
    RowsOfRank,
    is_of_four_bits,
    kept_weight_of,
    operand_of,
    rows_of_rank,
    scale_of,
    summed_backward,
    unsupported_format,
    unsupported_linear,
)
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.absorbed_attention import cpu, reference, triton, triton_pages
from modeling_deepseek_moe.ops.absorbed_attention.pages import Pages
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit

__all__ = ["Pages", "absorbed_attention", "attend_pages", "triton", "weight_for_pages"]


def absorbed_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    kv_b_proj: nn.Module,
    scaling: float,
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.absorbed_attention`, with its arguments and results, on the backend that can.

    Args:
        kv_b_proj: the layer whose weight is W_UK and W_UV of one head after the other, ``[H·(n+v), r]``.
    """
    rows = rows_of_rank(kv_b_proj)
    if rows is not None:
        c_kv = summed_backward(c_kv, kv_b_proj)
    tensors = (q_nope, q_pe, c_kv, k_pe, mask)
    plain = not (output_attentions or dropout or torch.is_autocast_enabled(q_nope.device.type))
    in_place = unsupported_linear(kv_b_proj) is None
    operand = operand_of(kv_b_proj) if in_place and is_of_four_bits(kv_b_proj) else None
    if operand is not None and plain:
        reason = four_bit.unsupported_operand(*operand) or cpu.unsupported_reason(*tensors, *operand[1::-1])
        if may_use(CPU, reason):
            parts, kind = four_bit.parts_of(operand.scales), operand.kind.removesuffix(NESTED)
            return cpu.decode_four_bit(*tensors, operand.codes, parts, kind, scaling), None
    weight, scale, in_place = _weight_of(kv_b_proj, rows, in_place and operand is None, q_nope)
    if plain and may_use(CPU, cpu.unsupported_reason(*tensors, weight)):
        return cpu.decode(*tensors, weight, scale, scaling), None
    if plain and may_use(TRITON, triton.unsupported_reason(*tensors, weight)):
        return triton.decode(*tensors, triton.bounds_of(mask, len(q_nope)), weight, scale, scaling), None
    if in_place:
        weight = kept_weight_of(kv_b_proj, q_nope)
    heads, nope = q_nope.shape[1], q_nope.shape[3]
    w_uk, w_uv = weight.view(heads, -1, weight.shape[-1]).tensor_split((nope,), dim=1)
    return reference.absorbed_attention(*tensors, w_uk, w_uv, scaling, dropout, output_attentions)


Weight = tuple[torch.Tensor, torch.Tensor | None]  # with the scales of its blocks


def weight_for_pages(q_nope: torch.Tensor, q_pe: torch.Tensor, pages: Pages, kv_b_proj: nn.Module) -> Weight | None:
    """The weight that `attend_pages` takes, of its other arguments and ``kv_b_proj`` as for `absorbed_attention`; ``None`` where it cannot."""
    # looked at first: elsewhere a weight in four bits would be decoded for nothing
    if _triton.refusal(q_nope.device) is not None or torch.is_autocast_enabled(q_nope.device.type):
        return None
    in_place = unsupported_linear(kv_b_proj) is None and not is_of_four_bits(kv_b_proj)
    weight, scale, _ = _weight_of(kv_b_proj, rows_of_rank(kv_b_proj), in_place, q_nope)
    reason = triton.unsupported_reason(q_nope, q_pe, pages.first, pages.second, None, weight)
    return (weight, scale) if may_use(TRITON, reason) else None


def attend_pages(
    q_nope: torch.Tensor, q_pe: torch.Tensor, pages: Pages, weight: Weight, scaling: float
) -> torch.Tensor:
    """`absorbed_attention` of one new token of each request to all of its own latents, all requests in one call.

    Args:
        q_nope, q_pe: ``[B, H, 1, n]`` and, rotated, ``[B, H, 1, p]``.
        weight: what `weight_for_pages` returned.

    Returns:
        ``[B, 1, H, v]``.
    """
    return triton_pages.decode(q_nope, q_pe, *pages, *weight, scaling)


def _weight_of(
    kv_b_proj: nn.Module, rows: RowsOfRank | None, in_place: bool, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The weight, its scales, and whether it is read where it lies; else it is in the dtype of ``like``."""
    if in_place:
        return kv_b_proj.weight, scale_of(kv_b_proj), True
    if rows is not None and (rows.scale is None or unsupported_format(kv_b_proj.weight_format) is None):
        return *rows, True
    return kept_weight_of(kv_b_proj, like), None, False
