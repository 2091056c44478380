"""Whether weights are as large as the engine, which goes by the config, takes them to be: it would read others past their end.

What was pruned or replaced in some other shape is called as the module that it is, where torch says what does not fit.
"""

from collections.abc import Mapping

import torch
from torch import nn

from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.ops._lora import LoraPair, base_of
from modeling_deepseek_moe.ops._operands import operand_of
from modeling_deepseek_moe.ops.experts import Operands

Sizes = Mapping[str, tuple[int, ...]]  # of the weights of a module's parts, by their names


def of_attention(config) -> Sizes:
    """Of the projections and norms of latent attention, DeepSeek-V3 report §2.1.1."""
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    return {
        "q_proj": (queries, config.hidden_size),
        "q_a_proj": (config.q_lora_rank, config.hidden_size),
        "q_a_layernorm": (config.q_lora_rank,),
        "q_b_proj": (queries, config.q_lora_rank),
        "kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, config.hidden_size),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (config.hidden_size, heads * config.v_head_dim),
    }


def of_mlp(mlp: nn.Module, hidden: int) -> Sizes:
    """Of a SwiGLU layer on states of ``hidden`` features, as wide as its own gate."""
    width = _size(mlp.gate_proj)[0]
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def misfit(module: nn.Module, wanted: Sizes, *names: str) -> str | None:
    """The first of a module's linear layers and norms of those names whose weight is of another size."""
    for name in names:
        found = _size(module._modules[name])
        if found != wanted[name]:
            return f"{name}: needs a weight of {list(wanted[name])}, found {list(found)}"
    return None


def misfit_of_router(gate: nn.Module, weights: Operands, hidden: int) -> str | None:
    """The same of a router, next to routed experts that the engine can read."""
    # a graph knows no addresses, and its operator looks at the stacks itself
    count = len(gate.weight) if weights.addresses is None else len(weights.addresses)
    bias = gate.e_score_correction_bias
    if tuple(gate.weight.shape) != (count, hidden) or (bias is not None and len(bias) != count):
        found = list(gate.weight.shape), None if bias is None else len(bias)
        return f"gate: needs a weight of {[count, hidden]}, and as many biases, found {found[0]} and {found[1]}"
    return f"gate: has {count} experts, found top_k={gate.top_k}" if gate.top_k > count else None


def misfit_of_scale(codes: torch.Tensor, scale: torch.Tensor) -> str | None:
    """The same of FP8 codes and the scales of their blocks."""
    wanted = block_fp8.scale_shape(codes.shape)
    return None if tuple(scale.shape) == wanted else f"needs scales {list(wanted)}, found {list(scale.shape)}"


def misfit_of_adapter(pair: LoraPair, base: nn.Module) -> str | None:
    """The same of what an adapter adds to a linear layer or a router."""
    (rows, columns), a, b = _size(base), pair.a, pair.b
    if a.device.type != "cpu" or b.device.type != "cpu":
        return f"adapter: needs CPU tensors, found {a.device} and {b.device}"
    if (a.shape[1], b.shape) == (columns, (rows, len(a))):
        return None
    return f"adapter: needs A [r, {columns}] and B [{rows}, r], found {list(a.shape)} and {list(b.shape)}"


def _size(module: nn.Module) -> tuple[int, ...]:
    """Of a norm's weight, or of a linear layer's whatever its codes are."""
    module = base_of(module)
    if module.weight.ndim == 1:
        return tuple(module.weight.shape)
    kind, codes, _ = operand_of(module)
    return (len(codes), codes.shape[1] if kind is None else 2 * codes.shape[1] * codes.itemsize)
