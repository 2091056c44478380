"""The definition of the indexer's choice in plain torch: by blocks of queries and of keys, with a running top-k.

Nothing of queries times keys is ever whole: a block's scores are merged with the best of the blocks before it.
"""

import torch

WORKSPACE = 1 << 24  # scores of single heads (B·S·h·T) computed at a time
KEYS = 8192  # of a block at most, where there are many queries
UNSEEN = float("-inf")


def select(
    queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, topk: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The keys with the greatest I[b, s, t] = Σ_h weights[b, s, h] · relu(queries[b, s, h] · keys[b, t]), summed in fp32.

    Args:
        queries: ``[B, S, h, d]``, rotated.
        weights: ``[B, S, h]`` in fp32, with the scale of a score in them.
        keys: ``[B, T, d]``, rotated.
        topk: keys to choose for each query.
        mask: ``None``: query s sees the keys up to T - S + s. ``[B or 1, 1, 1, T]``, boolean: the keys that may be seen, and
            causal besides. ``[B or 1, 1, S, T]``, boolean or added: as it is.

    Returns:
        ``[B, S, min(topk, T)]`` in int32, each row ascending; -1 at its end where fewer keys may be seen. Of equal scores
        the earlier key is chosen.
    """
    batch, length, heads, _ = queries.shape
    total = keys.shape[1]
    count = min(topk, total)
    width = min(total, max(KEYS, WORKSPACE // (batch * heads * length)))
    step = max(1, min(WORKSPACE // (batch * heads * width), WORKSPACE // (batch * (width + count))))
    parts = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        parts.append(_of_rows(queries[:, rows], weights[:, rows], keys, count, mask, rows, width, length))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _of_rows(queries, weights, keys, count: int, mask, rows: slice, width: int, length: int) -> torch.Tensor:
    """`select` of one block of queries, ``rows`` of ``length``, by blocks of ``width`` keys."""
    batch, height, heads, dim = queries.shape
    total, is_causal = keys.shape[1], _is_causal(mask, length)
    seen = total - length + rows.stop if is_causal else total
    wide = queries.float().reshape(batch, height * heads, dim)
    best = positions = None
    for start in range(0, max(seen, 1), width):
        block = slice(start, min(start + width, total))
        scores = _masked(_scores(wide, weights, keys[:, block]), mask, rows, block, total - length, is_causal)
        index = torch.arange(block.start, block.stop, device=keys.device, dtype=torch.int32).expand_as(scores)
        if best is not None:
            scores, index = torch.cat((best, scores), dim=-1), torch.cat((positions, index), dim=-1)
        best, positions = _top(scores, index, min(count, scores.shape[-1]))
    if positions.shape[-1] < count:  # no later key may be seen
        missing = count - positions.shape[-1]
        best = torch.nn.functional.pad(best, (0, missing), value=UNSEEN)
        positions = torch.nn.functional.pad(positions, (0, missing))
    return _ascending(positions, best, total)


def select_whole(
    queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, topk: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`select` with all scores at once; which of equal ones are chosen is left to torch's top-k, as transformers leaves it."""
    batch, length, heads, dim = queries.shape
    total = keys.shape[1]
    scores = _scores(queries.float().reshape(batch, length * heads, dim), weights, keys)
    scores = _masked(scores, mask, slice(0, length), slice(0, total), total - length, _is_causal(mask, length))
    best, positions = scores.topk(min(topk, total), dim=-1)
    return _ascending(positions.int(), best, total)


def _is_causal(mask: torch.Tensor | None, length: int) -> bool:
    return mask is None or (mask.shape[2] == 1 and length > 1)


def _scores(queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[B, S, T]`` of ``queries [B, S·h, d]`` in fp32."""
    products = (queries @ keys.float().transpose(1, 2)).view(*weights.shape, -1).relu_()
    return (weights.float().unsqueeze(-2) @ products).squeeze(-2)


def _ascending(positions: torch.Tensor, scores: torch.Tensor, total: int) -> torch.Tensor:
    """Positions in order, -1 at the end for what may not be seen."""
    positions = positions.masked_fill(scores == UNSEEN, total).sort(dim=-1).values
    return positions.masked_fill(positions == total, -1)


def _masked(scores, mask, rows: slice, block: slice, offset: int, is_causal: bool) -> torch.Tensor:
    """``scores [B, rows, keys]``, -inf where a key may not be seen, and where a score is not a number."""
    scores = scores.nan_to_num(nan=UNSEEN, posinf=float("inf"), neginf=UNSEEN)
    if is_causal:
        row = torch.arange(rows.start, rows.stop, device=scores.device)[:, None] + offset
        later = torch.arange(block.start, block.stop, device=scores.device) > row
        scores = scores.masked_fill(later, UNSEEN)
    if mask is None:
        return scores
    part = mask[:, 0, rows if mask.shape[2] > 1 else slice(None), block]
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, UNSEEN)
    return (scores + part).masked_fill(part < torch.finfo(part.dtype).min / 2, UNSEEN)


def _top(scores: torch.Tensor, positions: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` best of each row in the order in which they stand; of equals the first."""
    if scores.shape[-1] == count:
        return scores, positions
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    better, equal = scores > least, scores == least
    free = count - better.sum(-1, keepdim=True)
    kept = better | (equal & (equal.cumsum(-1) <= free))
    slot = (kept.cumsum(-1) - 1).masked_fill(~kept, count)  # what is not kept goes to one place after the row
    shape = (*scores.shape[:-1], count + 1)
    best = scores.new_empty(shape).scatter_(-1, slot, scores)[..., :count]
    return best, positions.new_empty(shape).scatter_(-1, slot, positions)[..., :count]
