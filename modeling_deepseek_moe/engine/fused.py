"""Halves of a decoder layer in one call of the CPU engine, with any cache, and in graphs: operators on tensors.

The whole layer by address, which `plan` runs, is faster still, and takes a growing cache and one new token.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from modeling_deepseek_moe.block import DeepseekDecoderLayer
from modeling_deepseek_moe.compat import takes_cache
from modeling_deepseek_moe.engine import reasons
from modeling_deepseek_moe.engine.plan import Stages
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.ops import experts, mla_project, moe
from modeling_deepseek_moe.ops._lora import is_lora
from modeling_deepseek_moe.ops._operands import is_of_four_bits, scale_of
from modeling_deepseek_moe.quantized.mapped import MappedExperts

# `q_nope`, `q_pe`, `c_kv` and `k_pe`
FusedProjections = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def run_by_halves(layer: nn.Module, stages: Stages) -> Callable:
    """The call for a layer: `run_layer` if the engine runs a part of it, else the layer itself."""
    fuses_moe = stages.mlp is None and isinstance(layer.mlp, DeepseekMoE) and not _is_for_parts(layer.mlp)
    fuses_projections = stages.projections is None and not _is_for_parts(layer.self_attn)
    if fuses_projections or fuses_moe:
        return partial(run_layer, layer, fuses_projections, fuses_moe)
    return layer


def _is_for_parts(module: nn.Module) -> bool:
    """Whether weights are codes of four bits, or have adapters, which the operators of halves do not take: their parts do."""
    return any(
        is_lora(part)
        or reasons.is_adapted(part)
        or (is_of_four_bits(part) if isinstance(part, nn.Linear) else experts.kind_of(part) is not None)
        for part in module.modules()
    )


@takes_cache
def run_layer(
    layer: DeepseekDecoderLayer,
    fuses_projections: bool,
    fuses_moe: bool,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **context,
) -> torch.Tensor:
    """What calling ``layer`` computes for a few tokens, some of it in fewer calls.

    Args:
        fuses_projections, fuses_moe: which parts the engine runs; the others are called as modules.
    """
    normed, attention = layer.input_layernorm(hidden_states), layer.self_attn
    if fuses_projections:
        attended, _ = attention.attend(*fused_projections(attention, normed, position_embeddings), **context)
    else:
        attended, _ = attention(hidden_states=normed, position_embeddings=position_embeddings, **context)
    hidden_states = hidden_states + attended
    normed = layer.post_attention_layernorm(hidden_states)
    return hidden_states + (fused_moe(layer.mlp, normed) if fuses_moe else layer.mlp(normed))


def fused_projections(attention, x: torch.Tensor, position_embeddings) -> FusedProjections:
    """``q_nope``, ``q_pe``, ``c_kv`` and ``k_pe`` as `DeepseekAttention.attend` takes them."""
    config = attention.config
    linears, norms = reasons.parts(attention)
    scales = [scale for scale in map(scale_of, linears) if scale is not None]
    query, c_kv, k_pe = mla_project.cpu.project(
        *(x, *position_embeddings, [part.weight for part in linears], scales),
        *([norm.weight for norm in norms], [norm.variance_epsilon for norm in norms]),
        *(attention.num_heads, config.kv_lora_rank, bool(config.rope_interleave)),
    )
    query = query.unflatten(-1, (-1, config.qk_head_dim)).transpose(1, 2)
    q_nope, q_pe = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
    return q_nope, q_pe, c_kv.unsqueeze(1), k_pe.unsqueeze(1)


def fused_moe(layer: DeepseekMoE, x: torch.Tensor) -> torch.Tensor:
    gate, shared = layer.gate, layer.shared_experts
    if isinstance(layer.experts, MappedExperts):
        layer.experts.check_files()
    parts = () if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj)
    scales = [scale for scale in map(scale_of, parts) if scale is not None]
    weights = experts.operands(layer.experts)
    stacks = [stack for stack in weights.stacks if stack is not None] if weights.addresses is None else []
    return moe.cpu.moe(
        *(x, gate.weight, gate.e_score_correction_bias, *gate.routing),
        *(weights.addresses, stacks, weights.width, weights.dtype, [part.weight for part in parts], scales),
    )
