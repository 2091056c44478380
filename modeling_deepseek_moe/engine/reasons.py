"""Why the CPU engine cannot run a module for a few tokens: one function for each kind of module, one vocabulary.

Every function takes the module and the dtype of the activations and returns a sentence, or ``None`` where it can. What
depends on a call alone (how many tokens, gradients, autocast) is asked in `runs`.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.block import DeepseekDecoderLayer
from modeling_deepseek_moe.engine import sizes
from modeling_deepseek_moe.layers import DeepseekMLP, DeepseekRMSNorm
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.ops import _lora, _native, experts
from modeling_deepseek_moe.ops._hooks import is_hooked
from modeling_deepseek_moe.ops._library import PLAIN
from modeling_deepseek_moe.ops._lora import base_of
from modeling_deepseek_moe.ops._operands import is_of_four_bits, operand_of, scale_of, unsupported_linear
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.decode_step.cpu import DTYPES, WEIGHTS
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit
from modeling_deepseek_moe.ops.routing.cpu import MOST_EXPERTS
from modeling_deepseek_moe.ops.swiglu import unsupported_reason as unsupported_swiglu
from modeling_deepseek_moe.quantized.experts import QuantizedExperts, StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.sparse_attention import DeepseekSparseAttention

Reason = str | None


def layer(module: nn.Module, dtype: torch.dtype) -> Reason:
    """A decoder layer's own call; its halves are asked for by themselves."""
    if dtype not in DTYPES:
        return f"takes activations in {', '.join(map(str, DTYPES))}, found {dtype}"
    return _is_own(module, DeepseekDecoderLayer)


def projections(module: nn.Module, dtype: torch.dtype) -> Reason:
    """All of attention before keys meet queries."""
    if isinstance(module, DeepseekSparseAttention):
        return "has no stage for attention with an indexer (index_topk), which runs as the module that it is"
    reason = _is_own(module, DeepseekAttention)
    if reason is not None:
        return reason
    linears, norms = parts(module)
    reason = _of_parts(module, linears, linear, dtype) or _of_parts(module, norms, norm, dtype)
    if reason is None and len({_dtype_of(base_of(part)) for part in linears}) > 1:
        reason = "needs projections of one dtype"
    return reason or _misfit_of_attention(module, (*linears, *norms))


def attention(module: nn.Module, dtype: torch.dtype) -> Reason:
    """Attention before its output projection."""
    reason = projections(module, dtype) or _of_parts(module, (module.kv_b_proj,), linear, dtype)
    if reason is None and module.scaling != module.config.softmax_scale:
        reason = f"has one softmax scale for all layers, {module.config.softmax_scale}, found {module.scaling}"
    return reason or _misfit_of_attention(module, (module.kv_b_proj,))


def output(module: nn.Module, dtype: torch.dtype) -> Reason:
    """Attention's output projection."""
    return linear(module.o_proj, dtype) or _misfit_of_attention(module, (module.o_proj,))


def parts(module: DeepseekAttention) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """The projections and norms of attention in the order of the computation."""
    if module.config.q_lora_rank is None:
        return (module.q_proj, module.kv_a_proj_with_mqa), (module.kv_a_layernorm,)
    linears = module.q_a_proj, module.q_b_proj, module.kv_a_proj_with_mqa
    return linears, (module.q_a_layernorm, module.kv_a_layernorm)


def linear(module: nn.Module, dtype: torch.dtype) -> Reason:
    """A linear layer whose weight is read where it lies, alone or with an adapter."""
    reason = _lora.unsupported_reason(module) or unsupported_linear(base_of(module))
    if reason is not None:
        return reason
    pair, module = _lora.pair_of(module), base_of(module)
    reason = None if pair is None else sizes.misfit_of_adapter(pair, module)
    if reason is not None:
        return reason
    if is_of_four_bits(module):
        return four_bit.unsupported_operand(*operand_of(module))
    scale = scale_of(module)
    if (scale is None) != (module.weight.dtype == torch.bfloat16):
        return f"takes weights in {', '.join(map(str, WEIGHTS))}, found {module.weight.dtype}"
    reason = _tensor(module.weight, WEIGHTS)
    if reason is not None or scale is None:
        return reason
    return _tensor(scale, (torch.float32,)) or sizes.misfit_of_scale(module.weight, scale)


def norm(module: nn.Module, dtype: torch.dtype, width: int | None = None) -> Reason:
    """RMSNorm, of states with ``width`` features."""
    reason = _is_own(module, DeepseekRMSNorm) or _tensor(module.weight, (dtype,))
    if reason is None and width not in (None, module.weight.numel()):
        reason = f"needs a weight of [{width}], found {list(module.weight.shape)}"
    return reason


def embedding(module: nn.Module, dtype: torch.dtype) -> Reason:
    """A table of rows that are copied."""
    reason = _is_own(module, nn.Embedding)
    if reason is None and module._parameters.get("weight") is not module.weight:
        return "needs an embedding whose weight is a parameter"
    reason = reason or _tensor(module.weight, (dtype,))
    if reason is None and module.max_norm is not None:
        reason = "does not scale rows of an embedding (max_norm)"
    return reason


def mlp(module: nn.Module, dtype: torch.dtype, hidden: int) -> Reason:
    """SwiGLU of a dense layer or of shared experts, of states with ``hidden`` features."""
    reason = _is_own(module, DeepseekMLP)
    if reason is not None:
        return reason
    layers = module.gate_proj, module.up_proj, module.down_proj
    reason = _of_parts(module, layers, linear, dtype)
    if reason is None:
        reason = sizes.misfit(module, sizes.of_mlp(module, hidden), "gate_proj", "up_proj", "down_proj")
    layers = base_of(module.gate_proj), base_of(module.up_proj), base_of(module.down_proj)
    if reason is None and any(map(is_of_four_bits, layers)):
        if len({_dtype_of(part) for part in layers}) > 1 or len({operand_of(part).kind for part in layers}) > 1:
            return "needs weights of one dtype"
        return experts.cpu.unsupported_reason(torch.empty((1, 1), dtype=dtype), module.act_fn)
    return reason or unsupported_swiglu(torch.empty((1, 1), dtype=dtype), *layers, module.act_fn)


def router(module: nn.Module, dtype: torch.dtype) -> Reason:
    """A router's matrix and its choice."""
    reason = _lora.unsupported_reason(module)
    if reason is not None:
        return reason
    pair, module = _lora.pair_of(module), base_of(module)
    reason = _is_own(module, DeepseekTopkRouter) or _tensor(module.weight, (torch.bfloat16,))
    if reason is None and pair is not None:
        reason = sizes.misfit_of_adapter(pair, module)
    if reason is None and module.e_score_correction_bias is not None:
        reason = _tensor(module.e_score_correction_bias, (torch.float32,))
    if reason is None and module.num_experts > MOST_EXPERTS:
        reason = f"is for up to {MOST_EXPERTS} experts, found {module.num_experts}"
    return reason


def routed_experts(module: nn.Module, dtype: torch.dtype, hidden: int) -> Reason:
    """Routed experts on states with ``hidden`` features, however their weights are stored, alone or with an adapter."""
    if is_adapted(module):
        if dtype != torch.bfloat16:
            return f"runs adapters of experts for activations in bf16, found {dtype}"
        operands = module.for_engine()
        if operands is None:
            return "runs one adapter of experts at a time, that is not merged"
        if is_hooked(module) or any(is_hooked(child) for child in module.children()):
            return f"cannot call the hooks of a {type(module).__name__}"
        module = operands[0]
    reason = None
    if not (isinstance(module, QuantizedExperts) and hasattr(type(module), "addresses")) or is_hooked(module):
        reason = _is_own(module, DeepseekExperts, StackedQuantizedExperts, MappedExperts)
    if reason is not None:
        return reason
    chosen = module.config._experts_implementation if type(module) is DeepseekExperts else None
    if chosen not in (None, experts.IMPLEMENTATION):
        return f"is not the experts_implementation that was asked for: {chosen!r}"
    if getattr(module, "stream", None) is not None:
        return "does not run experts that are streamed with the rest of their layer"
    weights = experts.operands(module)
    probe = torch.empty((1, hidden), dtype=dtype)
    reason = experts.unsupported_reason(module, weights, probe)
    scales = [scale for scale in weights.stacks[2:] if scale is not None and weights.kind is None]
    return reason or next(filter(None, (_tensor(scale, (torch.float32,)) for scale in scales)), None)


def is_adapted(module: nn.Module) -> bool:
    """Whether experts have an adapter that says how the engine is to run it."""
    return hasattr(type(module), "for_engine")


def moe(module: nn.Module, dtype: torch.dtype, hidden: int) -> Reason:
    """A whole mixture-of-experts layer in one call, of states with ``hidden`` features."""
    reason = _is_own(module, DeepseekMoE)
    if reason is not None:
        return reason
    shared = () if module.shared_experts is None else (module.shared_experts,)
    return (
        _of_parts(module, (module.gate,), router, dtype)
        or _of_parts(module, (module.experts,), partial(routed_experts, hidden=hidden), dtype)
        or sizes.misfit_of_router(base_of(module.gate), experts.operands(_adapted(module.experts)), hidden)
        or _of_parts(module, shared, partial(mlp, hidden=hidden), dtype)
    )


def _adapted(module: nn.Module) -> nn.Module:
    """The experts themselves, of ones with an adapter that the engine runs."""
    return module.for_engine()[0] if is_adapted(module) else module


def _misfit_of_attention(module: DeepseekAttention, parts: Iterable[nn.Module]) -> Reason:
    names = {child: name for name, child in module._modules.items()}
    return sizes.misfit(module, sizes.of_attention(module.config), *(names[part] for part in parts))


def _dtype_of(module: nn.Module) -> object:
    """What activations are packed for: the weight's dtype, or the kind of its four-bit codes."""
    kind = operand_of(module).kind
    return module.weight.dtype if kind is None else kind.removesuffix(NESTED)


def _of_parts(module: nn.Module, parts: Iterable[nn.Module], reason_of: Callable, dtype: torch.dtype) -> Reason:
    """The first part's reason, with the part's name."""
    for part in parts:
        reason = reason_of(part, dtype)
        if reason is not None:
            name = next(name for name, child in module._modules.items() if child is part)
            return f"{name}: {reason}"
    return None


def _is_own(module: nn.Module, *kinds: type[nn.Module]) -> Reason:
    if type(module) not in kinds:
        return f"runs {' or '.join(kind.__name__ for kind in kinds)}, found {type(module).__name__}"
    return f"cannot call the hooks of a {type(module).__name__}" if is_hooked(module) else None


def _tensor(tensor: torch.Tensor, dtypes) -> Reason:
    """Why the engine cannot read a tensor where it lies."""
    if type(tensor) not in PLAIN or tensor.device.type != "cpu":
        return f"needs plain tensors on the CPU, found {type(tensor).__name__} on {tensor.device}"
    if tensor.dtype not in dtypes or not tensor.is_contiguous():
        return f"needs contiguous tensors in {', '.join(map(str, dtypes))}, found {_native.describe(tensor)}"
    return None
