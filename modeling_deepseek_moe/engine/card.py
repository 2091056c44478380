"""A new token of each sequence through the decoder layers on a GPU, with what lies between products in as few kernels as come.

The layers' own calls would start a kernel for every norm, sum and rotation. Here a residual's sum and the norm after it are
one, as are the first two projections, and norm, rotation and the cache's new row. What something foreign is attached to (an
adapter, a hook, a quantiser's layer) is called as the module that it is. Nothing is read on the host, and with a static cache
no shape depends on how far it is filled: a step can be captured as a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.block import DeepseekDecoderLayer
from modeling_deepseek_moe.cache import Fp8LatentLayer, Fp8StaticLayer, LatentLayer
from modeling_deepseek_moe.compat import takes_cache
from modeling_deepseek_moe.layers import DeepseekMLP, DeepseekRMSNorm
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.ops import _triton, absorbed_attention, block_fp8, experts, mla_project, moe, rms_norm
from modeling_deepseek_moe.ops._dispatch import TRITON, may_use
from modeling_deepseek_moe.ops._hooks import is_hooked
from modeling_deepseek_moe.ops._operands import kept_weight_of, scale_of, unsupported_linear
from modeling_deepseek_moe.ops.linear import project
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.sparse_attention import DeepseekSparseAttention

CACHES = (LatentLayer, StaticLayer, Fp8LatentLayer, Fp8StaticLayer)


class Step(NamedTuple):
    """What the layers of one step share.

    ``slots [1]`` int64: the row of the caches that is written. ``length``: of the keys, those of a static cache that are not
    filled yet too. ``mask``: ``[B or 1, 1, 1, length]`` or ``None``. ``bounds [B, 2]`` int32: see `triton.key_bounds`.
    """

    slots: torch.Tensor
    length: int
    mask: torch.Tensor | None
    bounds: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor


def unsupported_reason(layers: list[nn.Module], hidden_states: torch.Tensor, cache: Cache | None) -> str | None:
    """Why the layers cannot be run so; ``None`` if they can."""
    if torch.is_grad_enabled():
        return "computes no gradients"
    if hidden_states.shape[1] != 1 or cache is None or len(cache.layers) < len(layers):
        return "is for one new token of each sequence, and a cache"
    reason = _triton.unsupported_reason(hidden_states) or _triton.unsupported_floats(hidden_states)
    if reason is not None:
        return reason
    if any(isinstance(layer.self_attn, DeepseekSparseAttention) for layer in layers):
        return "has no kernel for attention with an indexer (index_topk)"
    for layer, cached in zip(layers, cache.layers, strict=False):
        if type(cached) not in CACHES or not cached.is_initialized:
            return f"takes growing and static caches that a prompt has filled, found {type(cached).__name__}"
        # rows of bytes are latents in FP8
        dtypes = {cached.values.dtype, cached.keys.dtype} - {torch.uint8}
        if dtypes != {hidden_states.dtype} or cached.keys.shape[0] != hidden_states.shape[0]:
            return f"takes a cache of the same dtype and batch, found {cached.keys.dtype}"
        own = (
            (layer, DeepseekDecoderLayer),
            (layer.self_attn, DeepseekAttention),
            (layer.self_attn.kv_a_layernorm, DeepseekRMSNorm),
            (layer.input_layernorm, DeepseekRMSNorm),
            (layer.post_attention_layernorm, DeepseekRMSNorm),
        )
        for module, kind in own:
            if type(module) is not kind or is_hooked(module):
                return f"runs {kind.__name__} itself, with no hook, found {type(module).__name__}"
    return None


@takes_cache
def run(
    layers: list[nn.Module],
    hidden_states: torch.Tensor,
    cache: Cache,
    past_length: int | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    **context,
) -> torch.Tensor:
    """``hidden_states [B, 1, D]`` after the last layer; the cache gets their row."""
    step = _step(hidden_states, cache, past_length, position_embeddings, attention_mask)
    normed = layers[0].input_layernorm(hidden_states)
    following = [layer.input_layernorm for layer in layers[1:]]
    for layer, cached, norm in zip(layers, cache.layers, [*following, None], strict=False):
        attended = _attend(layer.self_attn, normed, cached, step)
        post = layer.post_attention_layernorm
        hidden_states, normed = rms_norm.add_rms_norm(hidden_states, attended, post.weight, post.variance_epsilon)
        hidden_states, normed = _mix(layer.mlp, hidden_states, normed, norm)
    _advance(cache.layers[: len(layers)], past_length)
    return hidden_states


def _step(hidden_states, cache, past_length, position_embeddings, mask) -> Step:
    first = cache.layers[0]
    if past_length is None:
        # a copy: the cache's own count is moved on in place before the last kernel that reads it was started
        slots, length = first.cumulative_length.view(1).clone(), first.keys.shape[2]
    else:
        slots, length = torch.full((1,), past_length, device=hidden_states.device), past_length + 1
    bounds = None
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.contiguous()
        bounds = absorbed_attention.triton.key_bounds(mask.expand(len(hidden_states), -1, -1, -1))
    cos, sin = position_embeddings
    return Step(slots, length, mask, bounds, cos, sin)


def _advance(layers, past_length: int | None) -> None:
    for layer in layers:
        if isinstance(layer, LatentLayer):
            layer.advance(past_length + 1)
    counts = [layer.cumulative_length for layer in layers if isinstance(layer, StaticLayer)]
    if counts:
        torch._foreach_add_(counts, 1)


def _mix(
    mlp: nn.Module, hidden_states: torch.Tensor, normed: torch.Tensor, norm: DeepseekRMSNorm | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``hidden_states + mlp(normed)``, and its norm if the next layer has one."""
    if norm is None:
        return hidden_states + mlp(normed), None
    operands = _operands(mlp, hidden_states, normed, norm)
    if operands is None:
        return rms_norm.add_rms_norm(hidden_states, mlp(normed), norm.weight, norm.variance_epsilon)
    shape, (residual, rows) = hidden_states.shape, (t.flatten(0, 1) for t in (hidden_states, normed))
    _, weights, indices = mlp.gate(rows)
    name = experts.triton.kind(operands)
    joined = _joined(mlp.shared_experts, operands, name, indices.numel())
    shared = None if mlp.shared_experts is None or joined else mlp.shared_experts(rows)
    ends = shared, residual, norm.weight, norm.variance_epsilon, joined
    found = moe.triton.experts_and_norm(rows, indices, weights, *operands.stacks, name, *ends)
    return found[0].view(shape), found[1].view(shape)


def _joined(shared: nn.Module | None, operands: experts.Operands, name: str, slots: int) -> list[torch.Tensor]:
    """What the routed experts' kernels read of shared experts that they compute too: weights, then scales; empty if they do not."""
    if type(shared) is not DeepseekMLP or is_hooked(shared) or not experts.triton.joins(name, slots):
        return []
    layers = shared.gate_proj, shared.up_proj, shared.down_proj
    if not experts.cpu.is_silu(shared.act_fn) or any(unsupported_linear(layer) is not None for layer in layers):
        return []
    weights = [layer.weight for layer in layers]
    if any(weight.dtype != operands.stacks[0].dtype or not weight.is_contiguous() for weight in weights):
        return []
    return weights + ([scale_of(layer) for layer in layers] if name == experts.triton.FP8 else [])


def _operands(mlp: nn.Module, hidden_states, normed, norm: DeepseekRMSNorm) -> experts.Operands | None:
    """The stacks of routed experts that a kernel reads, if nothing else happens in their layer."""
    if type(mlp) is not DeepseekMoE or is_hooked(mlp) or is_hooked(mlp.experts):
        return None
    if type(mlp.experts) not in (DeepseekExperts, StackedQuantizedExperts):
        return None
    own = None, experts.IMPLEMENTATION
    if type(mlp.experts) is DeepseekExperts and mlp.experts.config._experts_implementation not in own:
        return None
    operands, weights = experts.operands(mlp.experts), normed.new_empty(0)
    reason = moe.triton.unsupported_reason(hidden_states, norm.weight)
    reason = reason or experts.triton.refuses(mlp.experts, operands, normed, weights)
    return operands if may_use(TRITON, reason) else None


def _attend(attention: DeepseekAttention, x: torch.Tensor, cached, step: Step) -> torch.Tensor:
    """What attention adds to the hidden states ``[B, 1, D]``."""
    config = attention.config
    has_rank = config.q_lora_rank is not None
    first, kv = _pair(attention.q_a_proj if has_rank else attention.q_proj, attention.kv_a_proj_with_mqa, x)
    keys, values = _buffers(cached)
    fused = _triton_latents(attention, first if has_rank else None, kv, keys, values, step)
    query = project(attention.q_b_proj, fused) if has_rank else first
    query = query.unflatten(-1, (-1, sum(attention.query_dims))).transpose(1, 2)
    q_nope, q_pe = query.split(attention.query_dims, dim=-1)
    weight, scale = _up(attention.kv_b_proj, q_nope)
    attended = absorbed_attention.triton.decode(
        *(q_nope, q_pe, keys[:, :, : step.length], values[:, :, : step.length], step.mask, step.bounds, weight, scale),
        *(attention.scaling, step.cos, step.sin, bool(config.rope_interleave)),
    )
    return project(attention.o_proj, attended.flatten(2))


def _pair(first: nn.Module, second: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two layers on the same ``x``: in one launch where both are FP8."""
    layers = first, second
    if all(unsupported_linear(layer) is None and layer.weight.dtype == block_fp8.FP8_DTYPE for layer in layers):
        reasons = (block_fp8.triton.unsupported_linear(x, layer.weight, block_fp8.BLOCK) for layer in layers)
        if may_use(TRITON, next(filter(None, reasons), None)):
            parts = (part for layer in layers for part in (layer.weight, scale_of(layer)))
            return block_fp8.triton.linear_pair(x, *parts)
    return project(first, x), project(second, x)


def _buffers(cached) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches' rows with room for one more."""
    if isinstance(cached, StaticLayer):
        return cached.keys, cached.values
    shapes = ((held, (*held.shape[:2], 1, held.shape[3])) for held in (cached.keys, cached.values))
    return cached.reserve(*(held.new_empty(shape) for held, shape in shapes))


def _triton_latents(attention, q_a, kv, keys, values, step: Step) -> torch.Tensor:
    """The caches' new row, and ``q_a`` normed."""
    norm, q_norm = attention.kv_a_layernorm, None if q_a is None else attention.q_a_layernorm
    return mla_project.triton.latents(
        *(kv, norm.weight, norm.variance_epsilon, step.cos, step.sin, keys, values, step.slots, q_a),
        None if q_norm is None else q_norm.weight,
        0.0 if q_norm is None else q_norm.variance_epsilon,
        bool(attention.config.rope_interleave),
    )


def _up(layer: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_UK and W_UV as the kernels read them: FP8 codes and scales, or a weight in the queries' dtype."""
    if unsupported_linear(layer) is None and layer.weight.dtype == block_fp8.FP8_DTYPE:
        return layer.weight, scale_of(layer)
    return kept_weight_of(layer, like).contiguous(), None
