"""Latent attention over the latents themselves (DeepSeek-V2 report, section 2.1): nothing is expanded.

q̃ = W_UKᵀ q_nope;  p = softmax((c_kv q̃ + k_pe q_pe) · scaling + mask);  o = W_UV (p c_kv), head by head.
"""

import torch
from torch import nn

from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._operands import scale_of, unsupported_linear, weight_of
from modeling_deepseek_moe.ops.absorbed_attention import cpu, reference

__all__ = ["absorbed_attention"]


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
    """``[B, q, H, v]``, and with ``output_attentions`` the weights ``[B, H, q, kv]``.

    Args:
        q_nope, q_pe: ``[B, H, q, n]`` and, rotated, ``[B, H, q, p]``.
        c_kv, k_pe: ``[B, 1, kv, r]`` and ``[B, 1, kv, p]``.
        mask: see `reference.apply_mask`.
        kv_b_proj: the layer whose weight is W_UK and W_UV of one head after the other, ``[H·(n+v), r]``.
        dropout: probability of dropping a weight.
    """
    tensors = (q_nope, q_pe, c_kv, k_pe, mask)
    plain = not (output_attentions or dropout or torch.is_autocast_enabled(q_nope.device.type))
    in_place = unsupported_linear(kv_b_proj) is None
    weight = kv_b_proj.weight if in_place else weight_of(kv_b_proj, q_nope)
    if plain and may_use(CPU, cpu.unsupported_reason(*tensors, weight)):
        return cpu.decode(*tensors, weight, scale_of(kv_b_proj) if in_place else None, scaling), None
    if in_place:
        weight = weight_of(kv_b_proj, q_nope)
    heads, nope = q_nope.shape[1], q_nope.shape[3]
    w_uk, w_uv = weight.view(heads, -1, weight.shape[-1]).tensor_split((nope,), dim=1)
    return reference.absorbed_attention(*tensors, w_uk, w_uv, scaling, dropout, output_attentions)
