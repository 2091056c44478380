"""The definition of routed experts in plain torch.

Legend: T tokens, K experts per token, D hidden size, R rows routed to one expert.
"""

from collections.abc import Callable

import torch


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
    top_k = topk_indices.shape[1]
    order = topk_indices.flatten().argsort(stable=True)
    counts = torch.bincount(topk_indices.flatten(), minlength=num_experts + 1)[:num_experts].tolist()
    out_TD = torch.zeros_like(hidden_TD)
    start = 0
    for index, count in enumerate(counts):
        if count:
            slots_R = order[start : start + count]
            tokens_R = slots_R // top_k
            result_RD = expert(index, hidden_TD[tokens_R]) * topk_weights.flatten()[slots_R, None]
            out_TD.index_add_(0, tokens_R, result_RD.to(out_TD.dtype))
            start += count
    return out_TD
