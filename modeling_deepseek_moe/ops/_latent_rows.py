"""A row of a cache that keeps latents in FP8: a code for each value, then the fp32 scales of tiles of 128 of them, as bytes.

Rows are bytes, so that whatever crops, reorders or copies a cache moves scales along with their codes.
"""

import torch
import torch.nn.functional as F

TILE = 128  # values that share a scale
ALIGNMENT = 16  # of codes and of scales: bytes of the widest loads


def row_bytes(rank: int) -> int:
    """Of a row of ``rank`` values, padding included."""
    return _aligned(rank) + _aligned(4 * -(-rank // TILE))


def codes_and_scales(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of ``rows [..., row_bytes(r)]`` uint8: E4M3 codes ``[..., r]``, as uint8, and scales ``[..., ⌈r/128⌉]`` fp32.

    Raises:
        ValueError: no such rows.
    """
    if rows.dtype != torch.uint8 or rows.shape[-1] != row_bytes(rank):
        raise ValueError(
            f"latents: found rows of {rows.shape[-1]} {rows.dtype}, wanted {row_bytes(rank)} {torch.uint8} for {rank} values"
        )
    return rows[..., :rank], rows[..., _aligned(rank) :].view(torch.float32)[..., : -(-rank // TILE)]


def encoded_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[R, row_bytes(r)]`` of codes ``[R, r]`` and scales ``[R, ⌈r/128⌉]``."""
    parts = codes.view(torch.uint8), scales.contiguous().view(torch.uint8)
    return torch.cat([F.pad(part, (0, _aligned(part.shape[1]) - part.shape[1])) for part in parts], dim=1)


def strides(cached: torch.Tensor | None) -> tuple[int, int]:
    """Of ``[B, 1, kv, ·]`` over B and kv; of none, zeros."""
    return (0, 0) if cached is None else (cached.stride(0), cached.stride(2))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
