"""Balance of the experts as pure functions: load, MaxVio, the bias update without an auxiliary loss, the balance loss.

arXiv:2408.15664; DeepSeek-V3 report, 2.1.2. Legend: T tokens, E experts, K experts per token, S sequences.
"""

import torch
import torch.nn.functional as F

from modeling_deepseek_moe.ops.experts import counts


def expert_load(topk_indices: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens that each expert got, ``[E]`` int64.

    Args:
        topk_indices: ``[T, K]``, the experts chosen.
        token_mask: ``[T]`` bool, the tokens that count (``None``: all).
    """
    slots = topk_indices.flatten()
    if token_mask is not None:
        # masked tokens go to one bin more: picking the others out would wait for the device
        slots = slots.masked_fill(~token_mask.repeat_interleave(topk_indices.shape[1]), num_experts)
    return counts(slots, num_experts + 1)[:num_experts]


def max_violation(load: torch.Tensor) -> torch.Tensor:
    """MaxVio = max load / mean load − 1 over the last dimension, fp32; 0 where nothing was counted."""
    total = load.sum(-1).clamp_min(1).float()
    violation = load.amax(-1).float() * load.shape[-1] / total - 1
    return violation.clamp_min(0)


def load_entropy(load: torch.Tensor) -> torch.Tensor:
    """Entropy of the load over the last dimension, as a part of its maximum ln E: 1 is even, 0 is one expert only."""
    share = load.float() / load.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(-1) / torch.log(torch.tensor(float(max(load.shape[-1], 2))))


def updated_bias(bias: torch.Tensor, load: torch.Tensor, gamma: float) -> torch.Tensor:
    """``b_i + γ`` for an underloaded expert, ``b_i − γ`` for an overloaded one, ``b_i`` at the mean exactly.

    Args:
        bias: ``[E]`` fp32.
        load: ``[E]`` integers of one optimizer step, over all ranks and micro-batches. Compared as integers: the same
            load gives the same bits, however it was gathered.
    """
    return bias + gamma * torch.sign(load.sum() - load * load.numel()).to(bias.dtype)


def balance_loss(
    scores_TE: torch.Tensor, topk_indices: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """``Σ_i f_i P_i`` of each sequence, ``[S]`` fp32, differentiable through P (V3 report, eq. 17-20, without α).

    f_i = E / (K·T_s) · number of the sequence's tokens that chose expert i; P_i = their mean of s_i / Σ_j s_j. Even load
    gives 1. V2's losses are the same with softmax scores: ``seq_aux`` as here, without it the whole batch is one sequence.

    Args:
        scores_TE: fp32 scores without bias.
        topk_indices: ``[T, K]``, the experts that these scores choose.
        sequence_T: the sequence of each token, in ``[0, S)``; ``S`` marks a token that does not count.
        num_sequences: S.
    """
    num_experts, top_k = scores_TE.shape[1], topk_indices.shape[1]
    tokens_S = counts(sequence_T, num_sequences + 1)[:num_sequences].clamp_min(1)
    slots = (sequence_T[:, None] * num_experts + topk_indices).flatten()
    chosen_SE = counts(slots, (num_sequences + 1) * num_experts).view(-1, num_experts)
    f_SE = chosen_SE[:num_sequences] * (num_experts / top_k) / tokens_S[:, None]
    normed_TE = F.normalize(scores_TE, p=1.0, dim=-1, eps=1e-20)
    sums_SE = normed_TE.new_zeros(num_sequences + 1, num_experts).index_add(0, sequence_T, normed_TE)
    return (f_SE.to(normed_TE.dtype) * sums_SE[:num_sequences] / tokens_S[:, None]).sum(-1)
