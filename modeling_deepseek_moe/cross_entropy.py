"""The loss of the next token, a few rows of logits at a time.

`torch.nn.functional.cross_entropy` keeps an fp32 copy of all logits, their log-softmax and its gradient: three times
``tokens · vocab_size`` numbers, 6 GB for 4,096 tokens of DeepSeek-V3's vocabulary. Here there is one gradient, in the logits'
own dtype.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Logits in fp32 that are worked on at a time: in a CPU's cache; elsewhere enough to be worth launching.
CHUNK = {"cpu": 1 << 20}
CHUNK_ELSEWHERE = 1 << 26


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """What transformers computes for causal language models, under the same arguments: a scalar in fp32.

    Args:
        logits: ``[B, S, vocab_size]``, of any floating dtype; the softmax is computed in fp32 (fp64 of fp64).
        labels: ``[B, S]``: the tokens, where ``ignore_index`` asks for nothing; shifted here.
        num_items_in_batch: what the sum is divided by; without it, the number of labels.
        shift_labels: ``[B, S]``: labels that are shifted already, in place of ``labels``.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits = logits.reshape(-1, vocab_size)
    shift_labels = shift_labels.reshape(-1).to(logits.device)
    if torch.compiler.is_compiling():  # which fuses it, and would unroll the rows
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(values, shift_labels, ignore_index=ignore_index, reduction="sum")
    else:
        total = CrossEntropySum.apply(logits, shift_labels, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class CrossEntropySum(torch.autograd.Function):
    """``Σ_r logsumexp(logits_r) - logits_r[label_r]`` over the rows that have a label."""

    @staticmethod
    def forward(ctx, logits_RV, labels_R, ignore_index):
        wanted_R = labels_R != ignore_index
        labels_R = labels_R.where(wanted_R, 0).unsqueeze(1)
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        lse_R1 = torch.empty(labels_R.shape, dtype=dtype, device=logits_RV.device)
        for rows in _chunks(logits_RV):
            torch.logsumexp(logits_RV[rows].to(dtype), 1, keepdim=True, out=lse_R1[rows])
        ctx.save_for_backward(logits_RV, labels_R, wanted_R, lse_R1)
        losses_R1 = lse_R1 - logits_RV.gather(1, labels_R)
        return losses_R1.squeeze(1).where(wanted_R, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        logits_RV, labels_R, wanted_R, lse_R1 = ctx.saved_tensors
        factor_R1 = (wanted_R * d_total).to(lse_R1.dtype).unsqueeze(1)
        gradient = torch.empty_like(logits_RV, memory_format=torch.contiguous_format)
        for rows in _chunks(logits_RV):
            softmax = torch.sub(logits_RV[rows], lse_R1[rows]).exp_()
            softmax.scatter_(1, labels_R[rows], softmax.gather(1, labels_R[rows]) - 1)
            torch.mul(softmax, factor_R1[rows], out=gradient[rows])
        return gradient, None, None


def _chunks(logits_RV: torch.Tensor) -> Iterator[slice]:
    rows, vocab_size = logits_RV.shape
    step = max(1, CHUNK.get(logits_RV.device.type, CHUNK_ELSEWHERE) // max(1, vocab_size))
    return (slice(start, start + step) for start in range(0, rows, step))
