"""Latent attention to the keys that an indexer chose (DeepSeek-V3.2 report, section 2.1).

While no query sees more than ``index_topk`` keys all of them are chosen, and attention is `DeepseekAttention` as it is; the
indexer's keys are cached even so. Beyond, each query attends to ``index_topk`` latents, absorbed, and the cost is linear.
"""

import torch
from transformers.cache_utils import Cache

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.cache import update_indexer
from modeling_deepseek_moe.indexer import DeepseekIndexer
from modeling_deepseek_moe.moe.training_state import TrainingPass
from modeling_deepseek_moe.ops.linear import project
from modeling_deepseek_moe.ops.sparse_attention import sparse_attention


class ChosenKeys:
    """What indexers chose in one pass of a model, for the layers that share it. Made where attention is sparse.

    It is kept by the layer that chose: a checkpointed layer is run once more after those that follow it, and takes what it
    took before.
    """

    def __init__(self, keeps_all: bool):
        """
        Args:
            keeps_all: in training; else what is chosen replaces what was.
        """
        self._keeps_all = keeps_all
        self._chosen: dict[int, torch.Tensor] = {}

    def put(self, layer_idx: int, indices: torch.Tensor) -> None:
        if not self._keeps_all:
            self._chosen.clear()
        self._chosen[layer_idx] = indices

    def get(self, layer_idx: int, device: torch.device) -> torch.Tensor:
        return self._chosen[layer_idx].to(device)


class DeepseekSparseAttention(DeepseekAttention):
    """`DeepseekAttention` with an indexer, or with the indices of the last layer before it that has one."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.indexer = DeepseekIndexer(config) if config.has_indexer(layer_idx) else None
        self.chooser = next(layer for layer in range(layer_idx, -1, -1) if config.has_indexer(layer))
        self.is_shared = layer_idx + 1 < config.num_hidden_layers and not config.has_indexer(layer_idx + 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_length: int | None = 0,
        chosen: ChosenKeys | None = None,
        training_pass: TrainingPass | None = None,
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `DeepseekAttention.forward`.

        Args:
            attention_mask: where attention is sparse as `ops.indexer.select` takes it.
            chosen: of this pass; ``None`` where every key is attended to.
            training_pass: where indexers are trained.
        """
        q_latent = self._query_latent(hidden_states)
        q_nope, q_pe = self._rotated_queries(project(self.q_b_proj, q_latent), position_embeddings)
        c_kv, k_pe = self._latents(hidden_states, position_embeddings)
        inputs = hidden_states, q_latent, position_embeddings
        seen = inputs, (q_nope, q_pe), (c_kv, k_pe), attention_mask
        keys = None
        if self.indexer is not None and (cache is not None or chosen is not None):
            keys = self._indexer_keys(hidden_states, position_embeddings, cache, past_length)
        if chosen is None:
            self._observed(training_pass, *seen, None)
            context |= {"attention_mask": attention_mask, "cache": cache, "past_length": past_length}
            return self.attend(q_nope, q_pe, c_kv, k_pe, **context)
        if keys is None:
            indices = chosen.get(self.chooser, hidden_states.device)
        else:
            indices = self.indexer(hidden_states, q_latent, position_embeddings, keys, attention_mask)
            if self.is_shared:
                chosen.put(self.layer_idx, indices)
        self._observed(training_pass, *seen, indices)
        c_kv, k_pe = self._cached(c_kv, k_pe, cache, past_length, q_nope)
        output = sparse_attention(q_nope, q_pe, c_kv, k_pe, indices, self.kv_b_proj, self.scaling)
        return project(self.o_proj, output.flatten(2)), None

    def _observed(self, training_pass: TrainingPass | None, *seen) -> None:
        if training_pass is not None and self.indexer is not None:
            training_pass.observe_attention(self, *seen)

    @torch.no_grad()
    def _indexer_keys(self, hidden_states, position_embeddings, cache: Cache | None, past_length: int | None):
        """``[B, kv, d]``, those of this pass cached."""
        keys = self.indexer.keys(hidden_states, position_embeddings)
        if cache is None:
            return keys
        keys = update_indexer(cache, keys, self.layer_idx)
        return keys if past_length is None else keys[:, : past_length + hidden_states.shape[1]]
