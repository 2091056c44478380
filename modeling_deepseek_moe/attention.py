"""Multi-head latent attention: latents are cached, and each call takes the cheaper of two equal forms.

DeepSeek-V2 report, section 2.1; V3 report, 2.1.1. Expanded: k = [W_UK c; k_pe], v = W_UV c for every cached token.
Absorbed: q̃ = W_UKᵀ q_nope meets the latents themselves, o = W_UV (p · c), and nothing is expanded.

Legend: B batch, H heads, q query length, kv cached length, r ``kv_lora_rank``, n / p / v the nope, rope and value
head dims. Caches hold c_kv ``[B, 1, kv, r]`` as keys and k_pe ``[B, 1, kv, p]`` as values.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from modeling_deepseek_moe.attention_chunks import attend, finish, merge
from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.ops._hooks import differs_by_row
from modeling_deepseek_moe.ops.absorbed_attention import absorbed_attention, attend_pages, weight_for_pages
from modeling_deepseek_moe.ops.linear import project
from modeling_deepseek_moe.ops.prompt_attention import interface
from modeling_deepseek_moe.paged import PagedLatents
from modeling_deepseek_moe.rope import apply_rotary

ABSORBED, EXPANDED = "absorbed", "expanded"


def choose_mla_path(config, query_length: int, kv_length: int) -> str:
    """The form that costs fewer multiply-adds for ``query_length`` new tokens over ``kv_length`` tokens in all."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    pairs = query_length * kv_length
    absorbed = pairs * (2 * rank + rope) + query_length * rank * (nope + value)
    expanded = pairs * (nope + rope + value) + kv_length * rank * (nope + value)
    return ABSORBED if absorbed < expanded else EXPANDED


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q kᵀ · scale + mask) v with the softmax in fp32; returns ``[B, q, H, v]`` and the probabilities."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = _softmax(scores)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in fp32 or wider; an fp64 mask value would overflow fp32 and leave padding rows NaN."""
    return F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


class DeepseekAttention(nn.Module):
    """Latent attention of one layer, with the parameter names of the release."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.scaling = config.softmax_scale
        self.kv_dims = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.query_dims = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.up_dims = (config.qk_nope_head_dim, config.v_head_dim)

        bias, hidden = config.attention_bias, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.num_heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, sum(self.kv_dims), bias=bias)
        self.kv_a_layernorm = DeepseekRMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.num_heads * sum(self.up_dims), bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `attend`, of ``hidden_states [B, q, hidden_size]`` and cosine and sine tables ``[B, q, p/2]``."""
        queries = self._queries(hidden_states, position_embeddings)
        return self.attend(*queries, *self._latents(hidden_states, position_embeddings), **context)

    def attend(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        c_kv: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        mla_path: str = EXPANDED,
        past_length: int | None = 0,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            q_nope, q_pe: ``[B, H, q, n]`` and, rotated, ``[B, H, q, p]``.
            c_kv, k_pe: ``[B, 1, q, r]`` and, rotated, ``[B, 1, q, p]``, of the new tokens: what the cache keeps.
            attention_mask: what the mask function of the attention implementation in use made, over the keys in use.
            mla_path: ``"absorbed"`` or ``"expanded"``.
            past_length: tokens cached before this call, or ``None`` when only the graph at run time will know
                (a static cache under ``torch.compile``): then the whole cache is attended to, under the mask.

        Returns:
            ``[B, q, hidden_size]`` and the probabilities ``[B, H, q, kv]`` where the implementation gives them.
        """
        (batch, _, length, _), new = q_nope.shape, (c_kv, k_pe)
        if isinstance(cache, PagedLatents):
            output = self._of_requests(q_nope, q_pe, c_kv, k_pe, cache)
            return project(self.o_proj, output.reshape(batch, length, -1)), None
        c_kv, k_pe = self._cached(c_kv, k_pe, cache, past_length, q_nope)
        is_latent = mla_path == ABSORBED
        if is_latent and not differs_by_row(self.kv_b_proj):
            output, weights = self._absorbed(q_nope, q_pe, c_kv, k_pe, attention_mask, output_attentions)
        elif (past_length or is_latent) and not output_attentions:
            output, weights = self._expanded_in_chunks(q_nope, q_pe, c_kv, k_pe, attention_mask), None
        else:
            c_kv, k_pe = (c_kv, k_pe) if past_length != 0 else new
            key, value = self._expand(c_kv, k_pe)
            value_dim = value.shape[-1]
            if self._wants_equal_dims(key.device) and value_dim < key.shape[-1]:
                value = F.pad(value, (0, key.shape[-1] - value_dim))
            attention = interface(self.config._attn_implementation, eager_attention)
            output, weights = attention(
                self,
                torch.cat((q_nope, q_pe), dim=-1),
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                output_attentions=output_attentions,
                **kwargs,
            )
            output = output[..., :value_dim]
        return project(self.o_proj, output.reshape(batch, length, -1)), weights

    def _cached(self, c_kv, k_pe, cache: Cache | None, past_length: int | None, like: torch.Tensor):
        """The latents of all tokens in use ``[B, 1, kv, ·]``, those of new ones cached, in the dtype of ``like``."""
        if cache is not None:
            length = c_kv.shape[2]
            c_kv, k_pe = cache.update(c_kv, k_pe, self.layer_idx)
            if past_length is not None:
                used = past_length + length
                c_kv, k_pe = c_kv[:, :, :used], k_pe[:, :, :used]
        if c_kv.dtype != like.dtype:  # a cache kept in another dtype
            c_kv, k_pe = c_kv.to(like.dtype), k_pe.to(like.dtype)
        return c_kv, k_pe

    def _wants_equal_dims(self, device: torch.device) -> bool:
        """Whether torch attends by blocks if values are as wide as keys, as its FlashAttention for CPUs does.

        Else it makes all scores in fp32 first, which takes up to 16 times as long, and memory by the square of the length.
        """
        dropout = self.training and self.attention_dropout
        return device.type == "cpu" and self.config._attn_implementation == "sdpa" and not dropout

    def _queries(self, hidden_states, position_embeddings):
        """``q_nope [B, H, q, n]`` and rotated ``q_pe [B, H, q, p]``."""
        if self.config.q_lora_rank is None:
            query = project(self.q_proj, hidden_states)
        else:
            query = project(self.q_b_proj, self._query_latent(hidden_states))
        return self._rotated_queries(query, position_embeddings)

    def _query_latent(self, hidden_states):
        """Normed ``[B, q, q_lora_rank]``."""
        return self.q_a_layernorm(project(self.q_a_proj, hidden_states))

    def _rotated_queries(self, query, position_embeddings):
        """``q_nope`` and rotated ``q_pe`` of ``[B, q, H·(n+p)]``."""
        query = query.unflatten(-1, (-1, sum(self.query_dims))).transpose(1, 2)
        q_nope, q_pe = query.split(self.query_dims, dim=-1)
        cos, sin = position_embeddings
        return q_nope, apply_rotary(q_pe, cos, sin, self.config.rope_interleave)

    def _latents(self, hidden_states, position_embeddings):
        """Normed ``c_kv [B, 1, q, r]`` and rotated ``k_pe [B, 1, q, p]``: what the cache keeps."""
        c_kv, k_pe = project(self.kv_a_proj_with_mqa, hidden_states).unsqueeze(1).split(self.kv_dims, dim=-1)
        cos, sin = position_embeddings
        return self.kv_a_layernorm(c_kv), apply_rotary(k_pe, cos, sin, self.config.rope_interleave)

    def expanded_keys(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """``[B, H, kv, n+p]`` of latents."""
        return self._expand(c_kv, k_pe)[0]

    def _expand(self, c_kv, k_pe):
        """``key [B, H, kv, n+p]`` and ``value [B, H, kv, v]``."""
        up = project(self.kv_b_proj, c_kv.squeeze(1)).unflatten(-1, (-1, sum(self.up_dims))).transpose(1, 2)
        k_nope, value = up.split(self.up_dims, dim=-1)
        return torch.cat((k_nope, k_pe.expand(-1, k_nope.shape[1], -1, -1)), dim=-1), value

    def _absorbed(self, q_nope, q_pe, c_kv, k_pe, mask, output_attentions):
        dropout = self.attention_dropout if self.training else 0.0
        return absorbed_attention(
            q_nope, q_pe, c_kv, k_pe, mask, self.kv_b_proj, self.scaling, dropout, output_attentions
        )

    def _of_requests(self, q_nope, q_pe, c_kv, k_pe, cache: PagedLatents):
        """Each request's queries over its own latents: at once where a kernel can, else one by one in the form that costs less."""
        if cache.is_decoding:
            pages, queries = cache.located(self.layer_idx), (q_nope.transpose(0, 2), q_pe.transpose(0, 2))
            weight = weight_for_pages(*queries, pages, self.kv_b_proj)
            if weight is not None:
                cache.write(c_kv, k_pe, self.layer_idx)
                return attend_pages(*queries, pages, weight, self.scaling)
        c_kv, k_pe = self._cached(c_kv, k_pe, cache, None, q_nope)
        outputs = []
        for queries, keys in cache.requests:
            tensors = q_nope[:, :, queries], q_pe[:, :, queries], c_kv[:, :, keys], k_pe[:, :, keys]
            if choose_mla_path(self.config, tensors[0].shape[2], tensors[2].shape[2]) == ABSORBED:
                outputs.append(self._absorbed(*tensors, None, False)[0])
            else:
                outputs.append(self._expanded_in_chunks(*tensors, None))
        return torch.cat(outputs, dim=1)

    def _expanded_in_chunks(self, q_nope, q_pe, c_kv, k_pe, mask):
        """Expanded attention over a past cache, its keys a chunk at a time, merged by log-sum-exp."""
        query = torch.cat((q_nope, q_pe), dim=-1)
        kv_length = c_kv.shape[2]
        chunk = min(kv_length, max(query.shape[2], 1024))
        total = None
        for start in range(0, kv_length, chunk):
            keys = slice(start, min(start + chunk, kv_length))
            key, value = self._expand(c_kv[:, :, keys], k_pe[:, :, keys])
            total = merge(total, attend(query, key, value, mask, keys, kv_length, self.scaling))
        return finish(*total, query.dtype)
