"""Routed experts for a few tokens on an accelerator, in plain torch and without a look at the routing on the host.

To give each expert its own rows the host has to know how many there are, and waits for the device in every layer. For few
tokens that is not needed: each slot takes the codes of its expert by an index on the device, or, where there are more slots
than experts, every expert runs on all tokens, whose weights are zero where they did not choose it.

Legend: T tokens, E experts, K experts per token, D hidden size, S = T·K slots.
"""

import torch
from torch import nn

MOST_TOKENS = 128  # that it pays to run through experts they did not choose: their weights are read for others anyway


def may_run(hidden_TD: torch.Tensor, topk_weights: torch.Tensor) -> bool:
    """Whether a call is for a few tokens on an accelerator, and without gradients: a backward pass would keep the codes."""
    if hidden_TD.device.type == "cpu" or len(hidden_TD) > MOST_TOKENS:
        return False
    return not (torch.is_grad_enabled() and (hidden_TD.requires_grad or topk_weights.requires_grad))


def run(
    module: nn.Module, hidden_TD: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """`reference.run_experts` of a stacked `QuantizedExperts`: ``[T, D]``; an index of E marks a slot served elsewhere."""
    if topk_indices.numel() <= module.num_experts:
        return _by_slots(module, hidden_TD, topk_indices, topk_weights)
    return _by_experts(module, hidden_TD, topk_indices, topk_weights)


def _by_slots(module, hidden_TD, topk_indices, topk_weights) -> torch.Tensor:
    served = topk_indices < module.num_experts
    chosen_S = torch.where(served, topk_indices, 0).flatten()
    top_k, results = topk_indices.shape[1], []
    for slot in range(len(chosen_S)):
        token, picked = slot // top_k, chosen_S[slot : slot + 1]
        matrices = module.matrices_by(lambda stack, picked=picked: stack.index_select(0, picked).squeeze(0))
        results.append(module.expert(matrices.values(), hidden_TD[token : token + 1]))
    results_TKD = torch.cat(results).unflatten(0, topk_indices.shape)
    weighted = torch.where(served.unsqueeze(-1), results_TKD * topk_weights.unsqueeze(-1), 0)
    return weighted.to(hidden_TD.dtype).sum(1)


def _by_experts(module, hidden_TD, topk_indices, topk_weights) -> torch.Tensor:
    out_TD = torch.zeros_like(hidden_TD)
    for index in range(module.num_experts):
        chosen_TK = topk_indices == index
        weight_T = torch.where(chosen_TK, topk_weights, 0).sum(1, keepdim=True)
        result_TD = module.expert(module.matrices(index).values(), hidden_TD) * weight_T
        # not by the weight alone: what no one asked for may have overflowed
        out_TD += torch.where(chosen_TK.any(1, keepdim=True), result_TD, 0).to(out_TD.dtype)
    return out_TD
