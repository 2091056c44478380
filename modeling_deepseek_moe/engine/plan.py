"""What the CPU engine runs of a decoder while it decodes: a table made once per prompt and looked over before every step.

A layer is three stages: norm, projections and attention; the output projection; norm and experts. After the last layer
comes the model's norm, a stage of its own. Those that the engine can run it runs by address, in runs as long as they come; between two runs whatever is foreign (an adapter, a hook, a
quantiser's layer, streamed experts) is called as the module that it is.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from modeling_deepseek_moe.cache import IndexedLatentLayer, LatentLayer
from modeling_deepseek_moe.compat import CACHE_NAME, takes_cache
from modeling_deepseek_moe.engine import reasons
from modeling_deepseek_moe.engine.watch import Watch
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.ops import _native, experts
from modeling_deepseek_moe.ops._dispatch import CPU, may_use, requested
from modeling_deepseek_moe.ops._lora import add_to, base_of
from modeling_deepseek_moe.ops._operands import matrix_of
from modeling_deepseek_moe.ops._structs import DecoderLayer, Expert, Experts, LowRank, Matrix, MlaShape, Norm, Routing
from modeling_deepseek_moe.ops.decode_step.cpu import STAGES, Run

SLOT = "_engine_plan"  # where a model carries the plan that was made of it
ATTEND, OUTPUT, MIX = range(STAGES)


class Stages(NamedTuple):
    """Why the engine cannot run each part of a layer; ``None`` where it can."""

    layer: str | None
    projections: str | None
    attention: str | None
    output: str | None
    mlp: str | None

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype, hidden: int) -> "Stages":
        """Of a decoder layer, of states in ``dtype`` with ``hidden`` features."""
        own = reasons.layer(layer, dtype)
        if own is not None:
            return cls(own, own, own, own, own)
        norm = reasons.norm(layer.input_layernorm, dtype, hidden)
        projections = norm or reasons.projections(layer.self_attn, dtype)
        attention = norm or reasons.attention(layer.self_attn, dtype)
        output = attention or reasons.output(layer.self_attn, dtype)
        kind = reasons.moe if isinstance(layer.mlp, DeepseekMoE) else reasons.mlp
        return cls(
            *(None, projections, attention, output),
            reasons.norm(layer.post_attention_layernorm, dtype, hidden) or kind(layer.mlp, dtype, hidden),
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
        self.stages = [Stages.of(layer, dtype, config.hidden_size) if is_there else NO_ENGINE for layer in self.layers]
        self._watch = Watch()
        self._kept: list[object] = []  # tables that the layers point to
        for module in (*self.layers, norm):
            self._watch.add(module)
        pairs = zip(self.layers, self.stages, strict=True)
        self._structs = (DecoderLayer * len(self.layers))(*(self._struct(*pair) for pair in pairs))
        norms = is_there and reasons.norm(norm, dtype, config.hidden_size) is None
        self._norm = _norm(norm) if norms else Norm()
        flags = [flag for stages in self.stages for flag in stages.native()] + [norms]
        self._segments = list(segments(flags))
        self.runs_anything, self.runs_all = any(flags[:-1]), all(flags)
        self.next_token: Any = None  # what `engine.next_token` makes of this plan
        attends = [stages.attention is None for stages in self.stages]
        # where the engine caches a layer's rows: as its module does, wherever the layer stands
        self._places = [layer.self_attn.layer_idx if own else None for layer, own in zip(layers, attends, strict=True)]
        sizes = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        self._mla = MlaShape(*sizes, config.v_head_dim, bool(config.rope_interleave))
        self._row = config.kv_lora_rank, config.qk_rope_head_dim
        self._softmax_scale = config.softmax_scale

    def __reduce__(self):
        return type(None), ()

    def is_of(self, layers: list[nn.Module], norm: nn.Module) -> bool:
        """Whether it was made of these."""
        return self.layers == layers and self.norm is norm

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether no module, hook, weight, number or wish for a backend was changed since the table was made.

        Raises:
            CheckpointError: a file that experts are mapped from was truncated or rewritten.
        """
        return dtype == self.dtype and requested() is self._request and self._watch.is_current()

    def can_write(self, cache: Cache | None, batch: int) -> bool:
        """Whether the layers of a cache can take new rows of ``batch`` sequences."""
        if cache is None or any(place is not None and place >= len(cache.layers) for place in self._places):
            return False
        own = LatentLayer, IndexedLatentLayer
        if not all(type(layer) in own for layer in cache.layers[: len(self.layers)]):
            return False
        used = filter(None, self._layers_of(cache))
        return all(type(layer) in own and layer.holds(batch, self._row, self.dtype) for layer in used)

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
        step = self.step(hidden_states.shape, cache, past_length, position_embeddings, attention_mask)
        context |= {CACHE_NAME: cache, "past_length": past_length}
        context |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        attended = None
        for first, last, runs in self._segments:
            if runs:
                hidden_states, attended = step.run(hidden_states, first, last)
            else:
                hidden_states = self._call(first, hidden_states, attended, context)
        self.advance(cache, past_length + hidden_states.shape[1])
        return hidden_states

    def step(
        self,
        shape: Sequence[int],
        cache: Cache,
        past_length: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
    ) -> Run:
        """For states of ``shape [B, q, D]``; the cache's layers get room for their rows, and count them in `advance`.

        Raises:
            ValueError: the states, an embedding's that was replaced, are of another width than the layers.
        """
        batch, tokens, hidden = shape
        if hidden != self._config.hidden_size:
            raise ValueError(f"hidden states: found {hidden} features, wanted hidden_size={self._config.hidden_size}")
        new = [torch.empty((batch, 1, tokens, size), dtype=self.dtype, device="cpu") for size in self._row]
        buffers = [layer and layer.reserve(*new) for layer in self._layers_of(cache)]
        tables = *position_embeddings, attention_mask, self._softmax_scale
        return Run(self._structs, self._norm, buffers, past_length, self._mla, shape, *tables)

    def advance(self, cache: Cache, length: int) -> None:
        """The layers that attended have ``length`` tokens now."""
        for layer in self._layers_of(cache):
            if layer is not None:
                layer.advance(length)

    def _layers_of(self, cache: Cache) -> list[LatentLayer | None]:
        """The cache's layer for each that attends here, ``None`` for others."""
        return [None if place is None else cache.layers[place] for place in self._places]

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
                gate, weights = base_of(layer.mlp.gate), experts.operands(self._routed(layer.mlp.experts, struct))
                struct.moe.gate = Matrix.of(gate.weight)
                self._kept += [weights.addresses, add_to(struct.moe.gate, layer.mlp.gate)]
                struct.moe.bias = _native.pointer(gate.e_score_correction_bias)
                struct.moe.routing = Routing(*gate.routing)
                struct.moe.routed = Experts.of(weights.addresses, weights.width, weights.dtype, weights.kind)
                if layer.mlp.shared_experts is not None:
                    self._one_expert(layer.mlp.shared_experts, struct)
            else:
                self._one_expert(layer.mlp, struct)
        return struct

    def _matrix(self, linear: nn.Module) -> Matrix:
        matrix, kept = matrix_of(linear)
        self._kept.append(kept)
        return matrix

    def _routed(self, module: nn.Module, struct: DecoderLayer) -> nn.Module:
        """The experts themselves; what an adapter adds to them goes into ``struct``."""
        if not reasons.is_adapted(module):
            return module
        operands = module.for_engine()
        self._watch.add_adapted(module, operands)
        for name, pair in zip(("gate_up", "down"), operands[1:], strict=True):
            if pair is not None:
                setattr(struct.moe, name, LowRank.of(*pair))
        return operands[0]

    def _one_expert(self, mlp: nn.Module, struct: DecoderLayer) -> None:
        """A SwiGLU layer as the only expert; layer by layer where one of them has an adapter."""
        gate, up, down = (self._matrix(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        entry = Expert(gate.data, gate.scale, up.data, up.scale, down.data, down.scale)
        self._kept.append(entry)
        struct.moe.shared = Experts(ctypes.addressof(entry), 1, gate.rows, gate.dtype, gate.scale_kind)
        if any(part.adapter for part in (gate, up, down)):
            struct.moe.parts = (Matrix * 3)(gate, up, down)


def segments(flags: list[bool]) -> Iterator[tuple[int, int, bool]]:
    """First stage, last stage (exclusive) and whether the engine runs them: its stages together, others one by one."""
    start = 0
    while start < len(flags):
        end = start + 1
        while flags[start] and end < len(flags) and flags[end]:
            end += 1
        yield start, end, flags[start]
        start = end


def _norm(norm: nn.Module) -> Norm:
    return Norm(norm.weight.data_ptr(), norm.variance_epsilon)
