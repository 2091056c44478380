"""One new token of each request over latents in pages on a GPU: three kernels for all of them, and nothing that waits for the host."""

import math

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import blocks, kernels, launch, padded
from modeling_deepseek_moe.ops.absorbed_attention import triton


def _decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    index: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Args:
        q_nope, q_pe: ``[B, H, 1, n]`` and, rotated, ``[B, H, 1, p]``.
        first, second, index, starts, longest: as `pages.Pages` has them; no other row is read.
        weight, scale_inv: ``kv_b_proj [H·(n+v), r]`` and its scales if it is FP8.

    Returns:
        ``[B, 1, H, v]``.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(q_nope, q_pe, first, second, index, starts, weight, scale_inv)
    batch, heads, _, nope = q_nope.shape
    rank, rope, half = weight.shape[1], q_pe.shape[3], first.shape[1]
    q_nope, q_pe = (t if t.stride(3) == 1 else t.contiguous() for t in (q_nope, q_pe))
    value = weight.shape[0] // heads - nope
    latent, q_pe = triton.absorb(q_nope, q_pe, weight, scale_inv, None, None, True, value)
    device = q_nope.device
    block_heads, block_keys, warps, stages = triton.tiles(_triton.capability(device), heads, q_nope.dtype)
    parts = triton.splits(batch, blocks(heads, block_heads), longest, _triton.processors(device))
    partial = latent.new_empty((batch, parts, heads, rank), dtype=torch.float32)
    log_sums = latent.new_empty((batch, parts, heads), dtype=torch.float32)
    launch(
        kernels("absorbed_attention", "triton_pages_kernels").split_pages,
        (blocks(heads, block_heads), parts, batch),
        device,
        *(latent, q_pe, first, second, index, starts, partial, log_sums, scaling / math.log(2), heads),
        *(*q_pe.stride()[:2], first.stride(0), second.stride(0)),
        **dict(R=rank, P=rope, HALF=half, RP=padded(rank), PP=padded(rope), BH=block_heads, BN=block_keys),
        **dict(STAGES=stages, warps=warps),
    )
    return triton.merge(partial, log_sums, weight, scale_inv, q_nope)


def _check(q_nope, q_pe, first, second, index, starts, weight, scale_inv) -> None:
    """Before a kernel reads them by address: raise where a tensor is smaller than the others, or the weight's shape, say."""
    batch, heads, new, nope = q_nope.shape
    fits = (
        new == 1
        and tuple(q_pe.shape[:3]) == (batch, heads, 1)
        and triton.weight_fits(weight, scale_inv, heads, nope)
        and first.ndim == second.ndim == 2
        and first.shape == second.shape
        and first.stride(1) == second.stride(1) == 1
        and first.shape[1] == blocks(q_pe.shape[3] + weight.shape[1], 2)
        and index.ndim == 1
        and (index.dtype, starts.dtype) == (torch.int64, torch.int32)
        and tuple(starts.shape) == (batch + 1,)
        and index.is_contiguous()
        and starts.is_contiguous()
    )
    if not fits:
        raise triton.unfit(
            "triton_mla_decode_pages",
            "q_nope [B, H, 1, n], q_pe [B, H, 1, p], halves [rows, ⌈(r+p)/2⌉] of rows, contiguous int64 index [keys] and int32 starts [B + 1], "
            f"{triton.WEIGHT}",
            *(q_nope, q_pe, first, second, index, starts, weight, scale_inv),
        )


decode = define(
    "triton_mla_decode_pages(Tensor q_nope, Tensor q_pe, Tensor first, Tensor second, Tensor index, Tensor starts, int longest, "
    "Tensor weight, Tensor? scale_inv, float scaling) -> Tensor",
    None,
    lambda q_nope, q_pe, first, second, index, starts, longest, weight, *_: q_nope.new_empty(
        (q_nope.shape[0], 1, q_nope.shape[1], weight.shape[0] // q_nope.shape[1] - q_nope.shape[3])
    ),
    _decode,
)
