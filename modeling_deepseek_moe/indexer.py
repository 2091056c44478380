"""The indexer of DeepSeek Sparse Attention: which keys a query attends to (DeepSeek-V3.2 report, section 2.1).

I[t, s] = Σ_h w[t, h] · relu(q[t, h] · k[s]): a few small heads, one key for all of them. The release multiplies queries and
keys by a Hadamard matrix before it rounds them to FP8. That matrix is orthonormal, so that every product q · k is the same
without it, and it is left out here, where they are not rounded.
"""

import torch
from torch import nn

from modeling_deepseek_moe.ops.indexer import select
from modeling_deepseek_moe.ops.linear import project
from modeling_deepseek_moe.rope import apply_rotary


class DeepseekIndexer(nn.Module):
    """Scores and choice of one layer, with the parameter names of the release. The choice has no gradient."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.rope_dim, self.interleave = config.qk_rope_head_dim, config.indexer_rope_interleave
        self.scale = self.num_heads**-0.5 * self.head_dim**-0.5
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The keys ``[B, q, k]`` of each query, ascending, as `ops.indexer.select` gives them.

        Args:
            hidden_states: ``[B, q, hidden_size]``, normed.
            q_latent: ``[B, q, q_lora_rank]``, the normed latent of the queries.
            keys: ``[B, kv, d]``, those of `keys` of this pass and of all before it.
            mask: as `ops.indexer.select` takes it.
        """
        queries = self.queries(q_latent, position_embeddings)
        return select(queries, self.weights(hidden_states), keys, self.topk, mask)

    def queries(self, q_latent: torch.Tensor, position_embeddings) -> torch.Tensor:
        """Rotated ``[B, q, h, d]``."""
        queries = project(self.wq_b, q_latent).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return self._rotated(queries, position_embeddings).transpose(1, 2)

    def keys(self, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
        """Normed and rotated ``[B, q, d]``: what the cache keeps besides the latents."""
        keys = self.k_norm(project(self.wk, hidden_states)).unsqueeze(1)
        return self._rotated(keys, position_embeddings).squeeze(1)

    def weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of the heads, ``[B, q, h]`` in fp32, with the scales of a score in them."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return project(self.weights_proj, wide) * self.scale

    def _rotated(self, x: torch.Tensor, position_embeddings) -> torch.Tensor:
        """``[B, h, q, d]``, of which the first ``qk_rope_head_dim`` turn."""
        rotary, rest = x.tensor_split((self.rope_dim,), dim=-1)
        cos, sin = position_embeddings
        return torch.cat((apply_rotary(rotary, cos, sin, self.interleave), rest), dim=-1)
