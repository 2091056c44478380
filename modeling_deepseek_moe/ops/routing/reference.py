"""The definition of routing in plain torch: the family's three top-k methods (DeepSeek-V3 report, eq. 12-16).

Legend: T tokens, E experts, G groups, e experts of a group, K experts per token.
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """How experts are chosen and weighed, whatever the router's weights.

    Attributes:
        n_group, topk_group: groups, and how many of the best stay eligible; 1 and 1 where groups do not matter.
        top_k: experts per token.
        softmax: scores are a softmax over the experts, else sigmoids.
        group_score_top2: a group counts by the sum of its two best experts (V3), else by its best (V2).
        norm_topk_prob: weights are divided by their sum.
        scaling_factor: of the weights, in the end.
    """

    n_group: int
    topk_group: int
    top_k: int
    softmax: bool
    group_score_top2: bool
    norm_topk_prob: bool
    scaling_factor: float


def scores(logits_TE: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The unbiased scores of all experts."""
    return logits_TE.softmax(dim=-1) if routing.softmax else logits_TE.sigmoid()


def choose(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[T, K]`` and indices ``[T, K]``. The bias picks experts and does not weigh them."""
    scores_TE = scores(logits_TE, routing)
    scores_for_choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if routing.n_group > 1:
        scores_TGe = scores_for_choice_TE.unflatten(1, (routing.n_group, -1))
        best = scores_TGe.topk(2, dim=-1).values.sum(-1) if routing.group_score_top2 else scores_TGe.amax(-1)
        kept = best.topk(routing.topk_group, dim=-1, sorted=False).indices
        dropped_TG = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        # -inf, not 0: a biased score may be negative, and 0 would then win
        scores_for_choice_TE = scores_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
    topk_indices = scores_for_choice_TE.topk(routing.top_k, dim=-1, sorted=False).indices
    topk_weights = scores_TE.gather(1, topk_indices)
    if routing.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * routing.scaling_factor, topk_indices
