"""Attention masks: causal, padded, packed. Packed sequences stay apart with a cache as without one."""

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import is_torchdynamo_compiling

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.paged import PagedLatents

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")


def build_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    cache: Cache | None,
    past_length: int | None,
    position_ids: torch.Tensor,
    *,
    maybe_packed: bool,
    dense: bool,
) -> torch.Tensor | BlockMask | None:
    """The mask of one forward pass, over the keys in use.

    Args:
        past_length: tokens cached before, ``None`` when unknown (a static cache under ``torch.compile``).
        maybe_packed: the caller gave ``position_ids``; where they restart, a new sequence begins.
        dense: the latent path needs a dense mask whatever ``attn_implementation`` says.

    Returns:
        What `transformers.masking_utils` makes for the attention implementation (``None``: plain causal), with the
        unused end of a static cache cut off.
    """
    if isinstance(cache, PagedLatents):
        return None  # each request is attended to by itself
    if dense and config._attn_implementation not in DENSE_IMPLEMENTATIONS:
        config = copy.copy(config)
        config._attn_implementation = "sdpa"
    # Nothing is cached: the keys are the new tokens, and the mask need not know the cache's size.
    cache = None if past_length == 0 else cache
    length = inputs_embeds.shape[1]
    packing = None
    # transformers itself keeps packed sequences apart when there is neither a cache nor a mask
    padding = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
    if maybe_packed and (cache is not None or attention_mask is not None):
        packing = _same_sequence(inputs_embeds.shape[0], length, cache, position_ids, padding)
    if padding is not None and past_length is not None:
        attention_mask = attention_mask[:, : past_length + length]
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE_NAME: cache},
        position_ids=position_ids,
        and_mask_function=packing,
    )
    if isinstance(mask, torch.Tensor) and past_length is not None:
        mask = mask[..., : past_length + length]
    return mask


def _same_sequence(
    batch: int, length: int, cache: Cache | None, position_ids: torch.Tensor, padding: torch.Tensor | None
):
    """A token at index i with position p began its sequence at i - p: it may attend no further back than that.

    This holds for packed rows, left padding and plain rows alike, and needs no memory of how a cache was filled. Where
    something since i - p is masked (``padding [B, K]``: answers of unlike lengths before the next turn, or padding on the
    right), positions stay low for that, and no sequence began.
    """
    offset = cache.get_query_offset() if cache is not None else 0
    index = torch.arange(length, device=position_ids.device) + offset
    start = (index - position_ids).expand(batch, -1)
    # one look for a prompt, which pays with a mask less; none for a token that is decoded: it would wait for the device
    may_look = not is_torchdynamo_compiling() and (length > 1 or start.device.type == "cpu")
    if may_look and not bool((start > 0).any()):
        return None
    if padding is not None:
        masked_before = F.pad((padding == 0).cumsum(-1), (1, 0))  # [B, K + 1]
        end = (index + 1).clamp(max=padding.shape[1]).expand(batch, -1)
        masked_since = masked_before.gather(1, end) - masked_before.gather(1, start.clamp(0, padding.shape[1]))
        start = start.masked_fill(masked_since > 0, 0)

    def keep(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx >= start[batch_idx, q_idx - offset]

    return keep
