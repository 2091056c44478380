"""Attention over chosen latents on the CPU engine: each query reads the rows of the cache that its indices name."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import LatentCache, Matrix, MlaShape, Queries
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit

CACHES = (torch.bfloat16, torch.float32)
WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn)  # the latter in blocks of 128 x 128


def unsupported_reason(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    weight: torch.Tensor,
    kind: str | None = None,
) -> str | None:
    """Why the engine cannot attend; ``None`` if it can. For the shapes see `_attend`; ``kind``: of codes of four bits."""
    if q_nope.device.type != "cpu" or weight.device.type != "cpu":
        return f"needs CPU tensors, found {q_nope.device} and {weight.device}"
    if q_nope.dtype not in CACHES or {q_nope.dtype, q_pe.dtype, k_pe.dtype} != {c_kv.dtype}:
        return f"takes queries and caches in one dtype, bf16 or fp32, found {q_nope.dtype} and {c_kv.dtype}"
    if (weight.dtype not in WEIGHTS and kind is None) or not weight.is_contiguous():
        return f"takes contiguous FP8, bf16 or four-bit weights, found {weight.dtype}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_nope, q_pe, c_kv, k_pe, weight)):
        return "computes no gradients"
    return _native.unavailable_reason()


def _attend(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Args:
        q_nope, q_pe: ``[B, H, S, n]`` and, rotated, ``[B, H, S, p]``, any strides over the first three.
        c_kv, k_pe: ``[B, 1, T, r]`` and ``[B, 1, T, p]``, any stride over B.
        indices: ``[B, S, k]`` in int32: rows of the cache, then -1 for none. A query that has none attends to nothing: 0.
        weight, scale_inv: ``kv_b_proj [H·(n+v), r]`` and its scales if it is FP8.

    Returns:
        ``[B, S, H, v]``.

    Raises:
        ValueError: shapes that do not belong together.
        IndexError: an index of no row, or after a -1.
    """
    if weight.dtype not in WEIGHTS or not weight.is_contiguous():
        raise ValueError(f"sparse_attention: found weights {weight.dtype}, wanted contiguous ones in {WEIGHTS}")
    if (scale_inv is not None) != (weight.dtype == torch.float8_e4m3fn):
        raise ValueError(f"sparse_attention: found weights {weight.dtype}, scales: {scale_inv is not None}")
    if scale_inv is not None:
        _native.check_scale("sparse_attention", weight, scale_inv)
        scale_inv = _native.fp32(scale_inv)
    return _run(q_nope, q_pe, c_kv, k_pe, indices, Matrix.of(weight, scale_inv), scaling)


def _attend_four_bit(q_nope, q_pe, c_kv, k_pe, indices, codes, scales, kind: str, scaling: float) -> torch.Tensor:
    """As `_attend`, of ``kv_b_proj``'s codes of four bits and `four_bit.cpu.parts_of` their scales."""
    weight, kept = four_bit.matrix("sparse_attention", kind, codes, four_bit.scales_of(scales))
    found = _run(q_nope, q_pe, c_kv, k_pe, indices, weight, scaling)
    del kept
    return found


def _run(q_nope, q_pe, c_kv, k_pe, indices, weight: Matrix, scaling: float) -> torch.Tensor:
    _check(q_nope, q_pe, c_kv, k_pe, indices, (weight.rows, weight.cols))
    batch, heads, tokens, nope = q_nope.shape
    length, rank = c_kv.shape[2:]
    rope, value = k_pe.shape[3], weight.rows // heads - nope
    q_nope, q_pe = (q if q.stride(3) == 1 else q.contiguous() for q in (q_nope, q_pe))
    c_kv, k_pe = (c if c.stride()[2:] == (c.shape[3], 1) else c.contiguous() for c in (c_kv, k_pe))
    indices = indices.contiguous()
    out = q_nope.new_empty((batch, tokens, heads, value))
    if not out.numel():
        return out
    strides = (q.stride(dim) for q in (q_nope, q_pe) for dim in (0, 2, 1))
    queries = Queries(q_nope.data_ptr(), q_pe.data_ptr(), *strides)
    _native.call(
        "dsm_sparse_attention",
        *(_native.DTYPES[q_nope.dtype], batch, tokens, length, byref(MlaShape(heads, nope, rope, rank, value))),
        *(byref(queries), byref(LatentCache.of(c_kv, k_pe)), indices.data_ptr(), indices.shape[2]),
        *(byref(weight), scaling, out.data_ptr()),
    )
    return out


def _check(q_nope, q_pe, c_kv, k_pe, indices, weight: tuple[int, int]) -> None:
    """Before C reads them: raise where a tensor is smaller than the others, or the weight's shape, say."""
    batch, heads, tokens, nope = q_nope.shape
    length, rank = c_kv.shape[2:]
    wanted = {
        "q_pe": (q_pe, (batch, heads, tokens, k_pe.shape[3])),
        "c_kv": (c_kv, (batch, 1, length, rank)),
        "k_pe": (k_pe, (batch, 1, length, k_pe.shape[3])),
        "indices": (indices, (batch, tokens, max(indices.shape[-1], 1))),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"sparse_attention: {name} is {tuple(tensor.shape)}, wanted {shape}")
    rows = heads * max(weight[0] // heads, nope + 1)
    if weight != (rows, rank):
        raise ValueError(f"sparse_attention: weight is {weight}, wanted {(rows, rank)}")
    if indices.dtype != torch.int32 or length < 1:
        raise ValueError(f"sparse_attention: indices in {indices.dtype} of {length} rows, wanted int32 and a row")
    if q_nope.dtype not in CACHES or {q_nope.dtype, q_pe.dtype, k_pe.dtype} != {c_kv.dtype}:
        raise ValueError(f"sparse_attention: queries {q_nope.dtype}, caches {c_kv.dtype}, wanted one of {CACHES}")


attend = define(
    "sparse_attention(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor indices, Tensor weight, "
    "Tensor? scale_inv, float scaling) -> Tensor",
    _attend,
    lambda q_nope, q_pe, c_kv, k_pe, indices, weight, scale_inv, scaling: _fake(q_nope, weight),
)
attend_four_bit = define(
    "sparse_attention_four_bit(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor indices, Tensor codes, "
    "Tensor[] scales, str kind, float scaling) -> Tensor",
    _attend_four_bit,
    lambda q_nope, q_pe, c_kv, k_pe, indices, codes, scales, kind, scaling: _fake(q_nope, codes),
)


def _fake(q_nope: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, nope = q_nope.shape
    return q_nope.new_empty((batch, tokens, heads, weight.shape[0] // heads - nope))
