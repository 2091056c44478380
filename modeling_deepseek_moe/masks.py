"""Attention masks: causal, padded, packed. Packed sequences stay apart with a cache as without one."""

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.utils import is_torchdynamo_compiling
from transformers.utils.import_utils import is_torchdynamo_exporting, is_tracing

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.paged import PagedLatents

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
HIDES = -1e4  # added to a score, nothing is left of its key


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
    by_key: bool = False,
) -> torch.Tensor | BlockMask | None:
    """The mask of one forward pass, over the keys in use.

    Args:
        past_length: tokens cached before, ``None`` when unknown (a static cache under ``torch.compile``).
        maybe_packed: the caller gave ``position_ids``; where they restart, a new sequence begins.
        dense: the latent path needs a dense mask whatever ``attn_implementation`` says.
        by_key: where a mask says the same of all queries (padding) it may be given once: boolean ``[B, 1, 1, keys]``, of the keys
            that may be seen, and causal besides. Nothing of queries times keys is made for it.

    Returns:
        What `transformers.masking_utils` makes for the attention implementation (``None``: plain causal), with the
        unused end of a static cache cut off.
    """
    if isinstance(cache, PagedLatents):
        return None  # each request is attended to by itself
    if isinstance(attention_mask, dict):  # as transformers makes them, one for each kind of layer
        (attention_mask,) = attention_mask.values()
    if dense and config._attn_implementation not in DENSE_IMPLEMENTATIONS:
        config = copy.copy(config)
        config._attn_implementation = "sdpa"
    # Nothing is cached: the keys are the new tokens, and the mask need not know the cache's size.
    cache = None if past_length == 0 else cache
    length = inputs_embeds.shape[1]
    positions = position_ids if maybe_packed else None
    if length == 1 and past_length and _sees_all(config, attention_mask, cache, past_length, inputs_embeds, positions):
        return None
    packing = None
    # transformers itself keeps packed sequences apart when there is neither a cache nor a mask
    padding = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
    if maybe_packed and (by_key or cache is not None or attention_mask is not None):
        packing = _same_sequence(inputs_embeds.shape[0], length, cache, position_ids, padding)
    if padding is not None and past_length is not None:
        attention_mask = attention_mask[:, : past_length + length]
    if by_key and packing is None and past_length is not None and (padding is not None or attention_mask is None):
        return _visible_keys(attention_mask, past_length + length)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE_NAME: cache},
        # by which it would tell packed sequences apart too; both at once go wrong in its vmap where a row is longer than the one before
        position_ids=position_ids if packing is None else None,
        and_mask_function=packing,
    )
    if isinstance(mask, torch.Tensor) and past_length is not None:
        mask = mask[..., : past_length + length]
    return _visible_pairs(mask) if by_key and isinstance(mask, torch.Tensor) else mask


def _sees_all(
    config,
    attention_mask,
    cache: Cache | None,
    past_length: int,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> bool:
    """Whether the next token of each row attends to all before it, so that the function below would make no mask.

    Two looks at most (none at positions that the caller did not give), where that function's way to the same answer takes a
    decoding step as long as a layer.
    """
    if type(cache) is not DynamicCache or config._attn_implementation != "sdpa" or inputs_embeds.device.type != "cpu":
        return False
    if is_tracing(inputs_embeds) or is_torchdynamo_exporting() or not getattr(config, "is_causal", True):
        return False
    if attention_mask is not None:
        is_plain = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if not is_plain or attention_mask.shape[1] != past_length + 1 or not attention_mask.all():
            return False
    # a sequence that began after the first cached token has lower positions
    return position_ids is None or bool((position_ids >= past_length).all())


class PromptMaskMixin:
    """Mixed into the language models before `GenerationMixin`."""

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """As transformers' function. Of a prompt for sparse attention the mask stays as it is: `build_mask` makes a smaller one."""
        if config.has_indexers and inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs)


def _visible_keys(padding: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """``[B, 1, 1, length]`` of ``padding [B, K]``; ``None`` where every key may be seen. What is past K may not."""
    if padding is None:
        return None
    visible = F.pad(padding, (0, length - padding.shape[1])) != 0
    if not is_torchdynamo_compiling() and bool(visible.all()):
        return None
    return visible[:, None, None, :]


def _visible_pairs(mask: torch.Tensor) -> torch.Tensor:
    """A dense mask as booleans, which is all that a choice of keys can tell.

    Raises:
        ValueError: it has values that are neither 0 nor hide a key.
    """
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not mask.is_floating_point() or not (is_torchdynamo_compiling() or bool((visible | (mask <= HIDES)).all())):
        raise ValueError(
            f"attention_mask: found {mask.dtype} values besides 0 and those up to {HIDES:g}, wanted booleans, or these: sparse "
            "attention has no bias for pairs of tokens"
        )
    return visible


def _same_sequence(
    batch: int, length: int, cache: Cache | None, position_ids: torch.Tensor, padding: torch.Tensor | None
):
    """A token at index i with position p began its sequence at i - p: it may attend no further back than that.

    This holds for packed rows, left padding and plain rows alike, and needs no memory of how a cache was filled. Of what is
    masked (``padding [B, K]``) positions do not count: where everything before i - p is, that was padding on the left; where
    something since then is (answers of unlike lengths before the next turn, or padding on the right), positions stay low for
    that. In neither case a sequence began.
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
        begin = start.clamp(0, padding.shape[1])
        masked = masked_before.gather(1, begin)
        start = start.masked_fill((masked == begin) | (masked_before.gather(1, end) > masked), 0)
        if may_look and not bool((start > 0).any()):
            return None  # rows that are padded, and not packed

    def keep(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx >= start[batch_idx, q_idx - offset]

    return keep
