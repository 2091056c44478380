"""What the CPU engine runs of a decoder while it decodes: a table made once per prompt and looked over before every step.

A layer is three stages: norm, projections and attention; the output projection; norm and experts. After the last layer
comes the model's norm, a stage of its own. Those that the engine can run it runs by address, in runs as long as they come; between two runs whatever is foreign (an adapter, a hook, a
quantiser's layer, streamed experts) is called as the module that it is.
"""

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.cache import IndexedLatentLayer, LatentLayer
from modeling_deepseek_moe.compat import CACHE_NAME, takes_cache
from modeling_deepseek_moe.engine import reasons
from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.ops import _native, experts
from modeling_deepseek_moe.ops._dispatch import CPU, may_use, requested
from modeling_deepseek_moe.ops._operands import any_hooked, is_hooked, operand_of
from modeling_deepseek_moe.ops._structs import DecoderLayer, Expert, Experts, LowRank, Matrix, MlaShape, Norm, Routing
from modeling_deepseek_moe.ops.decode_step.cpu import STAGES, Run
from modeling_deepseek_moe.quantized.mapped import MappedExperts

ATTEND, OUTPUT, MIX = range(STAGES)
NUMBERS = {  # attributes whose values are in the table
    DeepseekAttention: ("scaling",),
    DeepseekRMSNorm: ("variance_epsilon",),
    DeepseekTopkRouter: (
        *("top_k", "n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor"),
    ),
}


class Stages(NamedTuple):
    """Why the engine cannot run each part of a layer; ``None`` where it can."""

    layer: str | None
    projections: str | None
    attention: str | None
    output: str | None
    mlp: str | None

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype) -> "Stages":
        own = reasons.layer(layer, dtype)
        if own is not None:
            return cls(own, own, own, own, own)
        norm = reasons.norm(layer.input_layernorm, dtype)
        projections = norm or reasons.projections(layer.self_attn, dtype)
        attention = norm or reasons.attention(layer.self_attn, dtype)
        output = attention or reasons.linear(layer.self_attn.o_proj, dtype)
        kind = reasons.moe if isinstance(layer.mlp, DeepseekMoE) else reasons.mlp
        return cls(
            *(None, projections, attention, output),
            reasons.norm(layer.post_attention_layernorm, dtype) or kind(layer.mlp, dtype),
        )

    def native(self) -> tuple[bool, bool, bool]:
        return self.attention is None, self.output is None, self.mlp is None


NO_ENGINE = Stages(*["is not there, or not asked for"] * len(Stages._fields))


class Plan:
    """The layers of a decoder, and the norm after them, for few new tokens. Copies and pickles of it are ``None``."""

    def __init__(self, layers: list[nn.Module], norm: nn.Module, config, dtype: torch.dtype):
        self.dtype, self.layers, self.norm = dtype, layers, norm
        self._config, self._request = config, requested()
        is_there = may_use(CPU, _native.unavailable_reason())
        self.stages = [Stages.of(layer, dtype) if is_there else NO_ENGINE for layer in self.layers]
        self._unhooked: list[dict] = []  # attributes of modules that nothing is attached to
        self._hooked: list[nn.Module] = []
        self._children: list[tuple[dict, str, nn.Module]] = []
        self._tensors: list[tuple[dict, str, torch.Tensor, int]] = []
        self._numbers: list[tuple[dict, str, object]] = []
        self._mapped: list[tuple[MappedExperts, object]] = []
        self._adapted: list[tuple[nn.Module, tuple]] = []  # experts, and what their adapters were
        self._kept: list[object] = []  # tables that the layers point to
        for module in (*self.layers, norm):
            self._watch(module)
        pairs = zip(self.layers, self.stages, strict=True)
        self._structs = (DecoderLayer * len(self.layers))(*(self._struct(*pair) for pair in pairs))
        norms = is_there and reasons.norm(norm, dtype) is None
        self._norm = _norm(norm) if norms else Norm()
        flags = [flag for stages in self.stages for flag in stages.native()] + [norms]
        self._segments = list(segments(flags))
        self.runs_anything = any(flags[:-1])
        self._attends = [stages.attention is None for stages in self.stages]
        sizes = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        self._mla = MlaShape(*sizes, config.v_head_dim, bool(config.rope_interleave))
        self._softmax_scale = config.softmax_scale

    def __reduce__(self):
        return type(None), ()

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether no module, hook, weight, number or wish for a backend was changed since the table was made.

        Raises:
            CheckpointError: a file that experts are mapped from was truncated or rewritten.
        """
        if dtype != self.dtype or requested() is not self._request:
            return False
        if any_hooked(self._unhooked) or not all(map(is_hooked, self._hooked)):
            return False
        try:
            for children, name, child in self._children:
                if children[name] is not child:
                    return False
            for tensors, name, tensor, pointer in self._tensors:
                if tensors[name] is not tensor or tensor.data_ptr() != pointer:
                    return False
            for attributes, name, value in self._numbers:
                if attributes[name] is not value:
                    return False
        except KeyError:  # deleted
            return False
        if not all(_is_same(module.for_engine(), operands) for module, operands in self._adapted):
            return False
        for module, stream in self._mapped:
            if not isinstance(module, MappedExperts) or module.stream is not stream:  # moved to a device, and back
                return False
            module.check_files()
        return True

    def can_write(self, cache: Cache | None, hidden_states: torch.Tensor) -> bool:
        """Whether the layers of a cache can take the rows of ``hidden_states [B, q, D]``."""
        count, batch = len(self.layers), hidden_states.shape[0]
        if cache is None or len(cache.layers) < count:
            return False
        own = LatentLayer, IndexedLatentLayer
        return all(type(layer) in own and layer.holds(batch, self.dtype) for layer in cache.layers[:count])

    @takes_cache
    def run(
        self,
        hidden_states: torch.Tensor,
        cache: Cache,
        past_length: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **context,
    ) -> torch.Tensor:
        """``hidden_states [B, q, D]`` after the last layer and the norm; the cache, of `LatentLayer`, gets their rows."""
        (batch, tokens, _), mla = hidden_states.shape, self._mla
        new = [hidden_states.new_empty((batch, 1, tokens, size)) for size in (mla.kv_lora_rank, mla.qk_rope_head_dim)]
        used = [layer if attends else None for layer, attends in zip(cache.layers, self._attends, strict=False)]
        buffers = [layer and layer.reserve(*new) for layer in used]
        tables = *position_embeddings, attention_mask, self._softmax_scale
        step = Run(self._structs, self._norm, buffers, past_length, mla, hidden_states.shape, *tables)
        context |= {CACHE_NAME: cache, "past_length": past_length}
        context |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        attended = None
        for first, last, runs in self._segments:
            if runs:
                hidden_states, attended = step.run(hidden_states, first, last)
            else:
                hidden_states = self._call(first, hidden_states, attended, context)
        for layer in used:
            if layer is not None:
                layer.advance(past_length + tokens)
        return hidden_states

    def _call(self, stage: int, hidden_states, attended, context: dict) -> torch.Tensor:
        """A stage by its modules: attention with its output projection where both are foreign, a whole layer, or the norm."""
        if stage == STAGES * len(self.layers):
            return self.norm(hidden_states)
        layer = self.layers[stage // STAGES]
        if self.stages[stage // STAGES].layer is not None:
            return layer(hidden_states, **context) if stage % STAGES == ATTEND else hidden_states
        if stage % STAGES == MIX:
            return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        if stage % STAGES == ATTEND:
            arguments = {("cache" if name == CACHE_NAME else name): value for name, value in context.items()}
            return hidden_states + layer.self_attn(layer.input_layernorm(hidden_states), **arguments)[0]
        if self.stages[stage // STAGES].attention is None:
            return hidden_states + layer.self_attn.o_proj(attended)
        return hidden_states  # with its attention

    def _watch(self, whole: nn.Module) -> None:
        for module in whole.modules():
            if is_hooked(module):
                self._hooked.append(module)
            else:
                self._unhooked.append(module.__dict__)
            self._children += [(module._modules, name, child) for name, child in module._modules.items()]
            for tensors in (module._parameters, module._buffers):
                found = [(tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None]
                self._tensors += [(*slot, slot[2].data_ptr()) for slot in found]
            attributes = module.__dict__
            self._numbers += [(attributes, name, attributes[name]) for name in NUMBERS.get(type(module), ())]
            if isinstance(module, MappedExperts):
                self._mapped.append((module, module.stream))

    def _struct(self, layer: nn.Module, stages: Stages) -> DecoderLayer:
        """The stages that run, by address; what is checked here are no reasons, but what `reasons` has looked at."""
        struct = DecoderLayer()
        if stages.attention is None:
            attention, projections = layer.self_attn, struct.projections
            struct.input_norm = _norm(layer.input_layernorm)
            if self._config.q_lora_rank is None:
                projections.q_b = self._matrix(attention.q_proj)
            else:
                projections.q_a, projections.q_b = self._matrix(attention.q_a_proj), self._matrix(attention.q_b_proj)
                projections.q_a_norm = _norm(attention.q_a_layernorm)
            projections.kv_a = self._matrix(attention.kv_a_proj_with_mqa)
            projections.kv_a_norm = _norm(attention.kv_a_layernorm)
            struct.kv_b = self._matrix(attention.kv_b_proj)
        if stages.output is None:
            struct.o = self._matrix(layer.self_attn.o_proj)
        if stages.mlp is None:
            struct.post_attention_norm = _norm(layer.post_attention_layernorm)
            if isinstance(layer.mlp, DeepseekMoE):
                gate, weights = layer.mlp.gate, experts.operands(self._routed(layer.mlp.experts, struct))
                self._kept.append(weights.addresses)
                struct.moe.gate = Matrix.of(gate.weight)
                struct.moe.bias = _native.pointer(gate.e_score_correction_bias)
                struct.moe.routing = Routing(*gate.routing)
                struct.moe.routed = Experts.of(weights.addresses, weights.width, weights.dtype, weights.kind)
                if layer.mlp.shared_experts is not None:
                    struct.moe.shared = self._one_expert(layer.mlp.shared_experts)
            else:
                struct.moe.shared = self._one_expert(layer.mlp)
        return struct

    def _matrix(self, linear: nn.Module) -> Matrix:
        matrix, kept = operand_of(linear).matrix()
        self._kept.append(kept)
        return matrix

    def _routed(self, module: nn.Module, struct: DecoderLayer) -> nn.Module:
        """The experts themselves; what an adapter adds to them goes into ``struct``."""
        if not reasons.is_adapted(module):
            return module
        operands = module.for_engine()
        self._adapted.append((module, operands))
        for name, pair in zip(("gate_up", "down"), operands[1:], strict=True):
            if pair is not None:
                setattr(struct.moe, name, LowRank.of(*pair))
        return operands[0]

    def _one_expert(self, mlp: nn.Module) -> Experts:
        """A SwiGLU layer as the only expert."""
        gate, up, down = (self._matrix(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        entry = Expert(gate.data, gate.scale, up.data, up.scale, down.data, down.scale)
        self._kept.append(entry)
        return Experts(ctypes.addressof(entry), 1, gate.rows, gate.dtype, gate.scale_kind)


def segments(flags: list[bool]) -> Iterator[tuple[int, int, bool]]:
    """First stage, last stage (exclusive) and whether the engine runs them: its stages together, others one by one."""
    start = 0
    while start < len(flags):
        end = start + 1
        while flags[start] and end < len(flags) and flags[end]:
            end += 1
        yield start, end, flags[start]
        start = end


def _is_same(found: tuple | None, wanted: tuple) -> bool:
    """Whether an adapter's operands are still those that are in the table."""
    if found is None or found[0] is not wanted[0]:
        return False
    for pair, other in zip(found[1:], wanted[1:], strict=True):
        if (pair is None) is not (other is None):
            return False
        if pair is not None and (pair[0] is not other[0] or pair[1] is not other[1] or pair[2] != other[2]):
            return False
    return True


def _norm(norm: nn.Module) -> Norm:
    return Norm(norm.weight.data_ptr(), norm.variance_epsilon)
