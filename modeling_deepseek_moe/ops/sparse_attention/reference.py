"""The definition of sparse attention in plain torch: latents are gathered for a bounded number of queries at a time."""

import torch
from torch.utils.checkpoint import checkpoint

WORKSPACE = 1 << 24  # numbers of latents (B·S·k·(r + p)) gathered at a time, and scores computed


def sparse_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    indices: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """softmax over the chosen latents; with gradients to all but ``indices``, for which blocks are gathered once more.

    Args:
        q_nope, q_pe: ``[B, H, S, n]`` and, rotated, ``[B, H, S, p]``.
        c_kv, k_pe: ``[B, 1, T, r]`` and ``[B, 1, T, p]``.
        indices: ``[B, S, k]``, the latents of each query; -1: none. A query that has none yields zeros.
        w_uk, w_uv: ``[H, n, r]`` and ``[H, v, r]``.

    Returns:
        ``[B, S, H, v]``.
    """
    batch, heads, length, _ = q_nope.shape
    per_query = indices.shape[2] * max(c_kv.shape[3] + k_pe.shape[3], heads)
    step = max(1, WORKSPACE // max(1, batch * per_query))
    latents = torch.cat((c_kv, k_pe), dim=-1).squeeze(1) if length > 1 else None
    tensors = (q_nope, q_pe, c_kv, k_pe, w_uk, w_uv)
    recomputes = step < length and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    parts = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        gathered = (latents,) if latents is not None else (c_kv.squeeze(1), k_pe.squeeze(1))
        arguments = (q_nope[:, :, rows], q_pe[:, :, rows], indices[:, rows], w_uk, w_uv, scaling, *gathered)
        parts.append(checkpoint(_of_rows, *arguments, use_reentrant=False) if recomputes else _of_rows(*arguments))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _of_rows(q_nope, q_pe, indices, w_uk, w_uv, scaling: float, *latents: torch.Tensor) -> torch.Tensor:
    """`sparse_attention` of one block of queries; ``latents``: ``[B, T, r + p]``, or its two parts."""
    rank = w_uk.shape[-1]
    chosen = torch.cat([_gather(part, indices) for part in latents], dim=-1)  # [B, rows, k, r + p]
    q_latent = torch.einsum("bhsn,hnr->bshr", q_nope, w_uk)
    query = torch.cat((q_latent, q_pe.transpose(1, 2)), dim=-1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ chosen.transpose(2, 3)).to(wide) * scaling
    none = (indices < 0).unsqueeze(2)
    weights = scores.masked_fill(none, torch.finfo(wide).min).softmax(dim=-1).masked_fill(none, 0)
    o_latent = weights.to(query.dtype) @ chosen[..., :rank]
    return torch.einsum("bshr,hvr->bshv", o_latent, w_uv)


def _gather(latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``[B, rows, k, ·]`` of ``latents [B, T, ·]``; the first stands in for none."""
    batch, height, count = indices.shape
    flat = indices.clamp(min=0).long().reshape(batch, height * count, 1).expand(-1, -1, latents.shape[-1])
    return latents.gather(1, flat).view(batch, height, count, -1)
