"""A few new tokens over the latent cache on the CPU engine: one call, in which the cache is read once for all heads."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import LatentCache, Mask, Matrix, MlaShape, Queries
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit

CACHES = (torch.bfloat16, torch.float32)
FEW_TOKENS = 8  # of a sequence
WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn)  # the latter in blocks of 128 x 128


def unsupported_reason(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    kind: str | None = None,
) -> str | None:
    """Why the engine cannot attend; ``None`` if it can. For the shapes see `decode`; ``kind``: of codes of four bits."""
    if q_nope.device.type != "cpu" or weight.device.type != "cpu":
        return f"needs CPU tensors, found {q_nope.device} and {weight.device}"
    if not 1 <= q_nope.shape[2] <= FEW_TOKENS:
        return f"is for one new token to {FEW_TOKENS}, found {q_nope.shape[2]}"
    if q_nope.dtype not in CACHES or {q_nope.dtype, q_pe.dtype, k_pe.dtype} != {c_kv.dtype}:
        return f"takes queries and caches in one dtype, bf16 or fp32, found {q_nope.dtype} and {c_kv.dtype}"
    if (weight.dtype not in WEIGHTS and kind is None) or not weight.is_contiguous():
        return f"takes contiguous FP8, bf16 or four-bit weights, found {weight.dtype}"
    if mask is not None and mask.shape[1] != 1:
        return f"takes one mask for all heads, found {mask.shape[1]}"
    if mask is not None and mask.shape[2] != q_nope.shape[2]:
        return f"takes a mask with a row for each token, found {mask.shape[2]}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_nope, q_pe, c_kv, k_pe, weight)):
        return "computes no gradients"
    return _native.unavailable_reason()


def _decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Args:
        q_nope, q_pe: ``[B, H, q, n]`` and, rotated, ``[B, H, q, p]``.
        c_kv, k_pe: ``[B, 1, kv, r]`` and ``[B, 1, kv, p]``, any stride over B.
        mask: ``[B or 1, 1, q, kv]``; boolean (True attends) or added to the scores; ``None``: causal.
        weight, scale_inv: ``kv_b_proj [H·(n+v), r]`` and its scales if it is FP8.

    Returns:
        ``[B, q, H, v]``.

    Raises:
        ValueError: shapes that do not belong together.
    """
    fp8 = weight.dtype == torch.float8_e4m3fn
    _check(q_nope, q_pe, c_kv, k_pe, mask, (weight.shape[0], weight.shape[1]))
    wanted = tuple(-(-size // 128) for size in weight.shape) if fp8 else None
    if (None if scale_inv is None else tuple(scale_inv.shape)) != wanted:
        found = None if scale_inv is None else tuple(scale_inv.shape)
        raise ValueError(f"mla_decode: scale_inv is {found}, wanted {wanted}")
    if weight.dtype not in WEIGHTS or not weight.is_contiguous():
        raise ValueError(f"mla_decode: found weights {weight.dtype}, wanted contiguous ones in {WEIGHTS}")
    if scale_inv is not None:
        scale_inv = _native.fp32(scale_inv)
    return _attend(q_nope, q_pe, c_kv, k_pe, mask, Matrix.of(weight, scale_inv), scaling)


def _decode_four_bit(q_nope, q_pe, c_kv, k_pe, mask, codes, scales, kind: str, scaling: float) -> torch.Tensor:
    """As `_decode`, of ``kv_b_proj``'s codes of four bits and `four_bit.cpu.parts_of` their scales."""
    weight, kept = four_bit.matrix("mla_decode", kind, codes, four_bit.scales_of(scales))
    _check(q_nope, q_pe, c_kv, k_pe, mask, (weight.rows, weight.cols))
    found = _attend(q_nope, q_pe, c_kv, k_pe, mask, weight, scaling)
    del kept
    return found


def _attend(q_nope, q_pe, c_kv, k_pe, mask, weight: Matrix, scaling: float) -> torch.Tensor:
    batch, heads, tokens, nope = q_nope.shape
    length, rank = c_kv.shape[2:]
    rope, value = k_pe.shape[3], weight.rows // heads - nope
    q_nope, q_pe = (q if q.stride(3) == 1 else q.contiguous() for q in (q_nope, q_pe))
    c_kv, k_pe = (c if c.stride()[2:] == (c.shape[3], 1) else c.contiguous() for c in (c_kv, k_pe))
    if mask is not None:
        mask = _native.additive(mask[:, 0, -tokens:, :length])
    out = q_nope.new_empty((batch, tokens, heads, value))
    strides = (stride for q in (q_nope, q_pe) for stride in (q.stride(0), q.stride(2), q.stride(1)))
    queries = Queries(q_nope.data_ptr(), q_pe.data_ptr(), *strides)
    _native.call(
        "dsm_mla_decode",
        *(_native.DTYPES[q_nope.dtype], batch, tokens, length, byref(MlaShape(heads, nope, rope, rank, value))),
        *(byref(queries), byref(LatentCache.of(c_kv, k_pe)), byref(Mask.of(mask))),
        *(byref(weight), scaling, out.data_ptr()),
    )
    return out


def _check(q_nope, q_pe, c_kv, k_pe, mask, weight: tuple[int, int]) -> None:
    """Before C reads them: raise where a tensor is smaller than the others, or the weight's shape, say."""
    batch, heads, tokens, nope = q_nope.shape
    length, rank = c_kv.shape[2:]
    wanted = {
        "q_nope": (q_nope, (batch, heads, tokens, nope)),
        "q_pe": (q_pe, (batch, heads, tokens, k_pe.shape[3])),
        "c_kv": (c_kv, (batch, 1, length, rank)),
        "k_pe": (k_pe, (batch, 1, length, k_pe.shape[3])),
        "mask": (
            mask,
            None if mask is None else (mask.shape[0] if mask.shape[0] == batch else 1, 1, tokens, mask.shape[3]),
        ),
    }
    for name, (tensor, shape) in wanted.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"mla_decode: {name} is {found}, wanted {shape}")
    rows = heads * max(weight[0] // heads, nope + 1)
    if weight != (rows, rank):
        raise ValueError(f"mla_decode: weight is {weight}, wanted {(rows, rank)}")
    if mask is not None and mask.shape[3] < length:
        raise ValueError(f"mla_decode: the mask covers {mask.shape[3]} tokens, the cache holds {length}")
    if length < tokens or tokens < 1 or q_nope.dtype not in CACHES:
        raise ValueError(f"mla_decode: {tokens} of {length} tokens, queries {q_nope.dtype}")
    if {q_nope.dtype, q_pe.dtype, k_pe.dtype} != {c_kv.dtype}:
        raise ValueError("mla_decode: wants queries and caches of one dtype")


decode = define(
    "mla_decode(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor? mask, Tensor weight, Tensor? scale_inv, "
    "float scaling) -> Tensor",
    _decode,
    lambda q_nope, q_pe, c_kv, k_pe, mask, weight, scale_inv, scaling: q_nope.new_empty(
        (q_nope.shape[0], q_nope.shape[2], q_nope.shape[1], weight.shape[0] // q_nope.shape[1] - q_nope.shape[3])
    ),
)
decode_four_bit = define(
    "mla_decode_four_bit(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor? mask, Tensor codes, "
    "Tensor[] scales, str kind, float scaling) -> Tensor",
    _decode_four_bit,
    lambda q_nope, q_pe, c_kv, k_pe, mask, codes, scales, kind, scaling: q_nope.new_empty(
        (q_nope.shape[0], q_nope.shape[2], q_nope.shape[1], codes.shape[0] // q_nope.shape[1] - q_nope.shape[3])
    ),
)
