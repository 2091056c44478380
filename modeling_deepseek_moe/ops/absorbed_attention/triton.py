"""One new token over the latent cache on a GPU: three kernels for all heads, and nothing that waits for the host."""

import functools
import math

import torch

from modeling_deepseek_moe.ops import _latent_rows, _triton
from modeling_deepseek_moe.ops._dispatch import FLASH_ATTENTION_3, takes
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import blocks, kernels, launch, padded
from modeling_deepseek_moe.ops.absorbed_attention import flash_attention

WEIGHTS = (torch.float8_e4m3fn, *_triton.FLOATS)  # the first in blocks of 128 x 128
MOST_SPLITS = 64
BLOCK_KEYS = 64  # at least, for each split
BATCH = 16  # rows of a product of one head
WEIGHT = "a weight [H·(n+v), r], fp32 scales of its blocks of 128 × 128 if it is FP8, else none"


def unsupported_reason(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
) -> str | None:
    """Why the kernels cannot attend; ``None`` if they can. For the shapes see `decode`."""
    if q_nope.shape[2] != 1:
        return f"is for one new token, found {q_nope.shape[2]}"
    reason = _triton.unsupported_reason(q_nope, q_pe, c_kv, k_pe, mask, weight)
    reason = reason or _triton.unsupported_floats(q_nope, q_pe, c_kv, k_pe)
    if reason is None and (weight.dtype not in (WEIGHTS[0], q_nope.dtype) or not weight.is_contiguous()):
        reason = f"takes contiguous weights in FP8 or the queries' dtype, found {weight.dtype}"
    if reason is None and mask is not None and mask.shape[1:3] != (1, 1):
        reason = f"takes one mask for all heads, found {list(mask.shape)}"
    return reason


def tiles(card: int, heads: int, dtype: torch.dtype, in_codes: bool = False) -> tuple[int, int, int, int]:
    """Heads and keys of a program, warps and stages: the most heads that spill no register and fit the card's memory.

    Args:
        in_codes: latents are in FP8, whose values take registers before they are multiplied.
    """
    if dtype == torch.float32:
        return 16, 16, 4, 1
    if heads > 32 and card == 90:
        return 64, 32, 8, 3  # by warp groups
    if heads > 16 and card in (80, 90, 100, 103) and not in_codes:
        return 32, 32, 8, 3
    return 16, 32, 8 if in_codes else 4, 3


def splits(batch: int, heads: int, length: int, processors: int) -> int:
    """Parts of the keys: enough for two programs a processor."""
    wanted = blocks(2 * processors, batch * heads)
    return max(1, min(MOST_SPLITS, wanted, length // BLOCK_KEYS))


def _bounds(mask: torch.Tensor) -> torch.Tensor:
    rows, length = mask.shape[0], mask.shape[-1]
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    bounds = mask.new_empty((rows, 2), dtype=torch.int32)
    block = min(8192, padded(length))  # at once: one load after another would take longer than attending
    launch(
        kernels("absorbed_attention").find_bounds,
        (rows,),
        mask.device,
        mask.view(torch.uint8),
        bounds,
        length,
        mask.stride(0),
        BN=block,
        warps=8,
    )
    return bounds


# The first key that each row of a boolean mask [B, 1, 1, kv] attends to and one past the last, [B, 2] int32.
key_bounds = define(
    "triton_key_bounds(Tensor mask) -> Tensor",
    None,
    lambda mask: mask.new_empty((mask.shape[0], 2), dtype=torch.int32),
    _bounds,
)


def bounds_of(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """`key_bounds` for each of ``batch`` rows; ``None`` without a mask, and for one that is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return None
    bounds = key_bounds(mask)
    return bounds if len(bounds) == batch else bounds.expand(batch, 2).contiguous()


def absorb(q_nope, q_pe, weight, scale_inv, cos, sin, interleave: bool, value: int):
    """Queries ``[B, H, r]`` in the latent space and, if there are tables, ``q_pe [B, H, p]`` rotated."""
    batch, heads, _, nope = q_nope.shape
    rope, rank = q_pe.shape[3], weight.shape[1]
    latent = q_nope.new_empty((batch, heads, rank))
    rotated = q_nope.new_empty((batch, heads, rope)) if cos is not None else q_pe[:, :, 0]
    block = min(64, padded(rank))
    launch(
        kernels("absorbed_attention").absorb,
        (heads, blocks(rank, block), blocks(batch, BATCH)),
        q_nope.device,
        *(q_nope, q_pe, cos, sin, as_bytes(weight), scale_inv, latent, rotated, batch, heads),
        *(*q_nope.stride()[:2], *q_pe.stride()[:2]),
        0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
        **dict(N=nope, V=value, P=rope, R=rank, NP=padded(nope), PP=padded(rope // 2), BM=BATCH, BR=block),
        **dict(FP8=scale_inv is not None, ROTATE=cos is not None, INTERLEAVE=interleave),
    )
    return latent, rotated


def _decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    scaling: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleave: bool = True,
) -> torch.Tensor:
    """
    Args:
        q_nope, q_pe: ``[B, H, 1, n]`` and ``[B, H, 1, p]``; the latter rotated, unless ``cos`` and ``sin`` are given.
        c_kv, k_pe: ``[B, 1, kv, r]`` and ``[B, 1, kv, p]``, any stride over B and kv, as the queries 1 over the last. ``c_kv`` of
            bytes is as `_latent_rows` lays them out: the result is that of the decoded latents in the queries' dtype.
        mask: ``[B or 1, 1, 1, kv]``; boolean (True attends) or added to the scores.
        bounds: ``[B, 2]`` int32, the first key of each row and one past its last; nothing else is read.
        weight, scale_inv: ``kv_b_proj [H·(n+v), r]`` and its scales if it is FP8.
        cos, sin: ``[B or 1, 1, p/2]`` fp32.

    Returns:
        ``[B, 1, H, v]``; zeros where a row attends to nothing.
    """
    batch, heads, _, nope = q_nope.shape
    length, rank = c_kv.shape[2], weight.shape[1]
    rope, value = k_pe.shape[3], weight.shape[0] // heads - nope
    in_codes = c_kv.dtype == torch.uint8
    c_kv, scales = _latent_rows.codes_and_scales(c_kv, rank) if in_codes else (c_kv, None)
    latent, q_pe = absorb(q_nope, q_pe, weight, scale_inv, cos, sin, interleave, value)
    card = _triton.capability(q_nope.device)
    block_heads, block_keys, warps, stages = tiles(card, heads, q_nope.dtype, in_codes)
    parts = splits(batch, blocks(heads, block_heads), length, _triton.processors(q_nope.device))
    partial = latent.new_empty((batch, parts, heads, rank), dtype=torch.float32)
    log_sums = latent.new_empty((batch, parts, heads), dtype=torch.float32)
    kind, mask, mask_stride = _read_mask(mask)
    launch(
        kernels("absorbed_attention").split,
        (blocks(heads, block_heads), parts, batch),
        q_nope.device,
        *(latent, q_pe, c_kv, scales, k_pe, mask, bounds, partial, log_sums, scaling / math.log(2), heads, length),
        *(
            *q_pe.stride()[:2],
            *(n for cached in (c_kv, scales, k_pe) for n in _latent_rows.strides(cached)),
            mask_stride,
        ),
        **dict(R=rank, P=rope, RP=padded(rank), PP=padded(rope), BH=block_heads, BN=block_keys),
        **dict(BOUNDS=bounds is not None, CODES=in_codes, NATIVE=in_codes and card >= _triton.FP8_CORES),
        **dict(STAGES=stages, warps=warps),
        MASK=kind,
    )
    return merge(partial, log_sums, weight, scale_inv, q_nope)


def merge(partial, log_sums, weight, scale_inv, q_nope) -> torch.Tensor:
    """W_UV of each head times its joined parts ``[B, parts, H, r]``, whose sums' logarithms are ``[B, parts, H]``, both fp32."""
    batch, parts, heads, rank = partial.shape
    nope = q_nope.shape[3]
    value = weight.shape[0] // heads - nope
    out = q_nope.new_empty((batch, 1, heads, value))
    launch(
        kernels("absorbed_attention").merge,
        (heads, blocks(value, 32), blocks(batch, BATCH)),
        q_nope.device,
        *(partial, log_sums, as_bytes(weight), scale_inv, out, batch, heads, parts),
        **dict(N=nope, V=value, R=rank, BM=BATCH, BV=32, BK=min(128, padded(rank)), FP8=scale_inv is not None),
    )
    return out


def _by_library(q_nope, q_pe, c_kv, k_pe, weight, scale_inv, scaling, cos, sin, interleave: bool) -> torch.Tensor:
    """As `_decode` without a mask: queries and values go through W_UK and W_UV here, and between them FlashAttention attends."""
    value = weight.shape[0] // q_nope.shape[1] - q_nope.shape[3]
    latent, q_pe = absorb(q_nope, q_pe, weight, scale_inv, cos, sin, interleave, value)
    attended = flash_attention.attend(latent, q_pe, c_kv, k_pe, scaling=scaling).float().unsqueeze(1)
    return merge(attended, attended.new_zeros(attended.shape[:3]), weight, scale_inv, q_nope)


def _chosen(
    q_nope, q_pe, c_kv, k_pe, mask, bounds, weight, scale_inv, scaling, cos=None, sin=None, interleave=True
) -> torch.Tensor:
    """`_decode`, or what does the same faster on this card; tensors that do not fit each other raise before either."""
    _check(q_nope, q_pe, c_kv, k_pe, mask, bounds, weight, scale_inv)
    q_nope, q_pe, c_kv, k_pe = (t if t.stride(3) == 1 else t.contiguous() for t in (q_nope, q_pe, c_kv, k_pe))
    rest = weight, scale_inv, scaling, cos, sin, interleave
    own = functools.partial(_decode, q_nope, q_pe, c_kv, k_pe, mask, bounds, *rest)
    theirs = functools.partial(_by_library, q_nope, q_pe, c_kv, k_pe, *rest)
    card = _triton.capability(q_nope.device)
    masked = mask is not None or bounds is not None
    find_reason = functools.partial(flash_attention.unsuitable, card, q_nope, c_kv, k_pe, masked, scaling, theirs, own)
    return theirs() if takes(FLASH_ATTENTION_3, "attention over latents", find_reason) else own()


def _read_mask(mask: torch.Tensor | None) -> tuple[str, torch.Tensor | None, int]:
    """Its kind, as the kernel names it, the mask with keys one after the other, and its stride over rows."""
    if mask is None:
        return "none", None, 0
    kind = "bool" if mask.dtype == torch.bool else "add"
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    mask = mask.view(torch.uint8) if kind == "bool" else mask
    return kind, mask, 0 if mask.shape[0] == 1 else mask.stride(0)


def as_bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight


def _check(q_nope, q_pe, c_kv, k_pe, mask, bounds, weight, scale_inv) -> None:
    """Before a kernel reads them by address: raise where a tensor is smaller than the others, or the weight's shape, say."""
    batch, heads, new, nope = q_nope.shape
    (length, width), (rope, rank) = c_kv.shape[2:], (k_pe.shape[3], weight.shape[-1])
    fits = (
        new == 1
        and tuple(q_pe.shape) == (batch, heads, 1, rope)
        and tuple(c_kv.shape[:2]) == (batch, 1)
        and tuple(k_pe.shape[:3]) == (batch, 1, length)
        and weight_fits(weight, scale_inv, heads, nope)
        and width == (_latent_rows.row_bytes(rank) if c_kv.dtype == torch.uint8 else rank)
        and (mask is None or (mask.shape[0] in (1, batch) and mask.shape[-1] >= length))
        and (bounds is None or (tuple(bounds.shape) == (batch, 2) and bounds.dtype == torch.int32))
    )
    if not fits:
        raise unfit(
            "triton_mla_decode",
            "q_nope [B, H, 1, n], q_pe [B, H, 1, p], c_kv [B, 1, kv, r], k_pe [B, 1, kv, p], a mask [B or 1, 1, 1, kv] or none, int32 "
            f"bounds [B, 2] or none, {WEIGHT}",
            *(q_nope, q_pe, c_kv, k_pe, mask, bounds, weight, scale_inv),
        )


def weight_fits(weight: torch.Tensor, scale_inv: torch.Tensor | None, heads: int, nope: int) -> bool:
    """Whether ``kv_b_proj`` has rows of W_UK and of W_UV for each head, and scales of its blocks if it is FP8."""
    return (
        weight.ndim == 2
        and weight.shape[0] % heads == 0
        and weight.shape[0] // heads > nope
        and (scale_inv is None) == (weight.dtype != torch.float8_e4m3fn)
        and (scale_inv is None or tuple(scale_inv.shape) == tuple(blocks(n, 128) for n in weight.shape))
    )


def unfit(operation: str, wanted: str, *tensors: torch.Tensor | None) -> ValueError:
    found = ", ".join("none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
    return ValueError(f"{operation}: found tensors that do not fit each other, {found}, wanted {wanted}")


decode = define(
    "triton_mla_decode(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor? mask, Tensor? bounds, Tensor weight, "
    "Tensor? scale_inv, float scaling, Tensor? cos=None, Tensor? sin=None, bool interleave=True) -> Tensor",
    None,
    lambda q_nope, q_pe, c_kv, k_pe, mask, bounds, weight, *_, **__: q_nope.new_empty(
        (q_nope.shape[0], 1, q_nope.shape[1], weight.shape[0] // q_nope.shape[1] - q_nope.shape[3])
    ),
    _chosen,
)
