"""DeepSeek Sparse Attention's choice of keys (V3.2 report, section 2.1): the ``index_topk`` that the indexer scores highest."""

import torch

from modeling_deepseek_moe.ops._dispatch import CPU, may_use, requested_backend
from modeling_deepseek_moe.ops.indexer import cpu, reference

__all__ = ["select"]

# With fewer, no head may know a key: its score is exactly zero, often that of several keys. Which of these are chosen is
# torch's to say then, as in transformers, so that small models say what they say there.
ENOUGH_HEADS = 16


@torch.no_grad()
def select(
    queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, topk: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`reference.select`, with its arguments and result, on the backend that can. A choice has no gradient."""
    heads, total = queries.shape[2], keys.shape[1]
    is_small = heads < ENOUGH_HEADS and queries.shape[:3].numel() * total <= reference.WORKSPACE
    if is_small and requested_backend() != CPU:
        return reference.select_whole(queries, weights, keys, topk, mask)
    if may_use(CPU, cpu.unsupported_reason(queries, weights, keys, mask)):
        return cpu.select(queries, weights, keys, mask, topk)
    return reference.select(queries, weights, keys, topk, mask)
