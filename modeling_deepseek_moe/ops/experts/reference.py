"""The definition of routed experts in plain torch.

Legend: T tokens, K experts per token, D hidden size, S = T·K slots in the experts' order, R rows routed to one expert.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F


def counts(values: torch.Tensor, bins: int) -> torch.Tensor:
    """How often each of ``0 ... bins - 1`` is among integers, ``[bins]`` int64. `torch.bincount` would wait for a device."""
    return values.new_zeros(bins, dtype=torch.int64).scatter_add_(0, values.long(), torch.ones_like(values).long())


class Slots(NamedTuple):
    """Which token and which expert meet, in the experts' order.

    ``order [S]``: slots ``t · K + k``, stable. ``places [T, K]``: where each slot went. ``counts``: slots of each expert;
    what is left over after them is served by another expert-parallel rank.
    """

    order: torch.Tensor
    places: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, topk_indices: torch.Tensor, num_experts: int) -> "Slots":
        experts = topk_indices.flatten()
        order = experts.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        # the one wait for a device: how many rows an expert gets is the shape of what it computes
        return cls(order, places.view(topk_indices.shape), counts(experts, num_experts + 1)[:num_experts].tolist())

    def experts(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Each expert that was hit, its rows among the slots, and their tokens ``[R]``."""
        tokens = self.order // self.places.shape[1]
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                rows = slice(start, start + count)
                yield expert, rows, tokens[rows]
            start += count

    def combine(self, results_SD: torch.Tensor) -> torch.Tensor:
        """``[S, D] → [T, D]``: the sum over the slots of each token, added in fp32. Overwrites slots served elsewhere."""
        results_SD[sum(self.counts) :] = 0
        return F.embedding_bag(self.places, results_SD, mode="sum")


def run_experts(
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    num_experts: int,
) -> torch.Tensor:
    """Σ_k weight_k · expert_k(hidden): each expert that was hit runs once, on the rows routed to it.

    An index of ``num_experts`` marks a slot that another expert-parallel rank serves, and is skipped.
    """
    slots = Slots.of(topk_indices, num_experts)
    out_TD = torch.zeros_like(hidden_TD)
    for index, rows, tokens_R in slots.experts():
        result_RD = expert(index, hidden_TD[tokens_R]) * topk_weights.flatten()[slots.order[rows], None]
        out_TD.index_add_(0, tokens_R, result_RD.to(out_TD.dtype))
    return out_TD
