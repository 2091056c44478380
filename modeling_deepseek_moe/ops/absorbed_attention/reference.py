"""The definition of absorbed attention in plain torch, a bounded number of scores at a time."""

import torch
import torch.nn.functional as F

WORKSPACE_SCORES = 1 << 24  # attention scores (B·H·q·kv) computed at a time


def absorbed_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Args:
        q_nope, q_pe: ``[B, H, q, n]`` and, rotated, ``[B, H, q, p]``.
        c_kv, k_pe: ``[B, 1, kv, r]`` and ``[B, 1, kv, p]``.
        mask: see `apply_mask`.
        w_uk, w_uv: ``[H, n, r]`` and ``[H, v, r]``.
        dropout: probability of dropping a weight.

    Returns:
        ``[B, q, H, v]``, and with ``output_attentions`` the weights ``[B, H, q, kv]``.
    """
    batch, heads, length, _ = q_nope.shape
    kv_length = c_kv.shape[2]
    c_kv, k_pe = c_kv.squeeze(1), k_pe.squeeze(1)
    step = max(1, WORKSPACE_SCORES // (batch * heads * kv_length)) if not output_attentions else length
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    parts, weights = [], None
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        q_latent = _per_head(q_nope[:, :, rows], w_uk)
        # the heads' queries are rows of one matrix: they all meet the same keys
        scores = _rows_by_keys(q_latent.flatten(1, 2), c_kv)
        scores = scores + _rows_by_keys(q_pe[:, :, rows].flatten(1, 2), k_pe)
        scores = scores.view(batch, heads, -1, kv_length).to(wide) * scaling
        scores = apply_mask(scores, mask, rows, slice(0, kv_length), length, kv_length)
        weights = F.dropout(F.softmax(scores, dim=-1).to(q_nope.dtype), p=dropout)
        o_latent = _rows_by_values(weights.flatten(1, 2), c_kv).view(q_latent.shape)
        parts.append(_per_head(o_latent, w_uv.transpose(1, 2)))
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return output.transpose(1, 2), weights if output_attentions else None


def apply_mask(scores, mask, rows: slice, keys: slice, query_length: int, kv_length: int) -> torch.Tensor:
    """Apply a dense mask (boolean: True attends; float: added; None: causal) to ``scores [B, H, rows, keys]``."""
    if mask is None:
        if query_length == 1:
            return scores
        offset = kv_length - query_length
        row_ids = torch.arange(rows.start, rows.stop, device=scores.device)[:, None] + offset
        allowed = torch.arange(keys.start, keys.stop, device=scores.device)[None, :] <= row_ids
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    part = mask[:, :, rows if mask.shape[2] > 1 else slice(None), keys]
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, torch.finfo(scores.dtype).min)
    return scores + part


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [B, H, q, a]`` times each head's ``weight [H, a, b]`` → ``[B, H, q, b]``."""
    batch, heads, length, _ = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * length, -1)
    if weight.stride(-1) == 1:
        out = torch.bmm(rows, weight)
    else:  # a transposed weight is read as it lies, where bmm would first copy it
        out = torch.bmm(weight.transpose(1, 2), rows.transpose(1, 2)).transpose(1, 2)
    return out.reshape(heads, batch, length, -1).transpose(0, 1)


def _rows_by_keys(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``rows [B, R, d] · keys [B, kv, d]ᵀ → [B, R, kv]``; on a CPU bmm would copy the transposed cache."""
    if rows.device.type == "cpu":
        return torch.stack([F.linear(*pair) for pair in zip(rows.unbind(0), keys.unbind(0), strict=True)])
    return torch.bmm(rows, keys.transpose(1, 2))


def _rows_by_values(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``rows [B, R, kv] · values [B, kv, d] → [B, R, d]``."""
    if rows.device.type == "cpu":
        return torch.stack([a @ b for a, b in zip(rows.unbind(0), values.unbind(0), strict=True)])
    return torch.bmm(rows, values)
