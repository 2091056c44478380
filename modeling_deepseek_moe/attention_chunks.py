"""Expanded attention over a long cache, a chunk of keys at a time: each alone, then merged by log-sum-exp.

What a chunk yields is its own softmax and the logarithm of the sum that this was divided by. A row to which a chunk shows
nothing has a log-sum-exp near the dtype's minimum and counts for nothing; one that sees nothing at all (padding) yields zeros.
"""

import torch
import torch.nn.functional as F

from modeling_deepseek_moe.ops.absorbed_attention.reference import WORKSPACE_SCORES, apply_mask


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    keys: slice,
    kv_length: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scaling + mask) v over one chunk.

    Args:
        query: ``[B, H, q, d]``.
        key, value: ``[B, H, keys, d]`` and ``[B, H, keys, v]``.
        mask: of all keys, see `apply_mask`.
        keys: which of the ``kv_length`` keys these are.

    Returns:
        ``[B, H, q, v]`` and the log-sum-exp ``[B, H, q, 1]``, both in fp32 or wider.
    """
    tensors = (query, key, value)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    same_dtype = len({tensor.dtype for tensor in tensors}) == 1
    if query.device.type == "cpu" and same_dtype and value.shape[-1] <= key.shape[-1] and not needs_grad:
        return _flash(query, key, value, mask, keys, kv_length, scaling)
    return _matmul(query, key, value, mask, keys, kv_length, scaling)


def merge(
    first: tuple[torch.Tensor, torch.Tensor] | None, second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two chunks' outputs and log-sum-exps as those of one."""
    if first is None:
        return second
    norm = torch.logaddexp(first[1], second[1])
    return first[0] * torch.exp(first[1] - norm) + second[0] * torch.exp(second[1] - norm), norm


def finish(output: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[B, q, H, v]`` of ``dtype``."""
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # a mask's, which may be narrower
    return torch.where(norm > lowest / 2, output, 0).to(dtype).transpose(1, 2)


def _flash(query, key, value, mask, keys, kv_length, scaling):
    """torch's FlashAttention for CPUs, six to twelve times as fast; only this operator gives the log-sum-exp too.

    It takes values as wide as keys, so narrower ones are padded, and a mask of their dtype to be added.
    """
    length, width = query.shape[2], value.shape[-1]
    causal = mask is None and length == keys.stop - keys.start == kv_length  # there is no past
    if not causal and (mask is not None or keys.stop > kv_length - length):  # else they are all in the past
        zero_scores = query.new_zeros((*((1, 1) if mask is None else mask.shape[:2]), length, keys.stop - keys.start))
        mask = apply_mask(zero_scores, mask, slice(0, length), keys, length, kv_length)
        # of a row of -inf it would give 0, and so would what rounds to that
        mask = mask.clamp_min(torch.finfo(query.dtype).min).to(query.dtype)
    value = F.pad(value, (0, key.shape[-1] - width))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, norm = flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)
    return output[..., :width].to(norm.dtype), norm.unsqueeze(-1)


def _matmul(query, key, value, mask, keys, kv_length, scaling):
    """The same in plain torch, a bounded number of scores at a time."""
    batch, heads, length, _ = query.shape
    step = max(1, WORKSPACE_SCORES // (batch * heads * key.shape[2]))
    wide = torch.promote_types(query.dtype, torch.float32)
    parts = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        scores = torch.matmul(query[:, :, rows], key.transpose(2, 3)).to(wide) * scaling
        scores = apply_mask(scores, mask, rows, keys, length, kv_length).clamp_min(torch.finfo(wide).min)
        peak = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - peak)
        norm = weights.sum(-1, keepdim=True)
        parts.append((torch.matmul(weights.to(value.dtype), value) / norm, peak + norm.log()))
    output, norm = zip(*parts, strict=True)
    return torch.cat(output, dim=2), torch.cat(norm, dim=2)
