"""Decoding with DeepSeek Sparse Attention at long contexts: what a token reads, compared with attention to every latent.

A token reads the indexer's keys of all T tokens before it, one of ``index_head_dim`` a layer that has an indexer, and the
latents of those that were chosen, min(T, ``index_topk``) a layer (DeepSeek-V3.2 report, section 2.1). Attention to all reads
T latents a layer and no key.
"""

from collections.abc import Callable
from dataclasses import dataclass

from modeling_deepseek_moe.anatomy import ParameterBreakdown

CONTEXTS = (32_768, 131_072)


@dataclass(frozen=True)
class LongContext:
    """Of one conversation with ``tokens`` in the cache.

    ``*_bytes`` are what a token reads of the cache, ``*_tokens_per_second`` what is expected with the weights that it reads
    besides; ``None`` where no bandwidth was measured.
    """

    tokens: int
    cache_bytes: int
    sparse_bytes: int
    dense_bytes: int
    sparse_tokens_per_second: float | None
    dense_tokens_per_second: float | None


def long_contexts(
    breakdown: ParameterBreakdown, weight_bytes: int, seconds: Callable[[int], float | None], most: int
) -> tuple[LongContext, ...]:
    """Of the lengths in `CONTEXTS` that the model takes; none where attention is not sparse.

    Args:
        weight_bytes: that a token reads besides the cache.
        seconds: that a token takes for the bytes it reads.
        most: the model's context.
    """
    if breakdown.index_topk is None:
        return ()

    def speed(cache: int) -> float | None:
        taken = seconds(weight_bytes + cache)
        return None if taken is None else 1 / taken

    found = []
    for tokens in CONTEXTS:
        if tokens <= most:
            read = breakdown.cache_read_bytes(tokens), breakdown.latent_bytes(tokens)
            found.append(LongContext(tokens, breakdown.cache_bytes(tokens), *read, *map(speed, read)))
    return tuple(found)
