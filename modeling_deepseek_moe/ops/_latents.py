"""What the CPU engine's operations of latent attention share: their arguments, looked over before C reads them and laid out for it."""

from collections.abc import Mapping
from ctypes import byref
from typing import Any

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._structs import LatentCache, Matrix, MlaShape, Queries

DTYPES = (torch.bfloat16, torch.float32)  # of queries and caches
WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn)  # the latter in blocks of 128 x 128


def unsupported_reason(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    weight: torch.Tensor,
    kind: str | None = None,
) -> str | None:
    """Why the engine cannot attend; ``None`` if it can. For the shapes see `check`; ``kind``: of codes of four bits."""
    if q_nope.device.type != "cpu" or weight.device.type != "cpu":
        return f"needs CPU tensors, found {q_nope.device} and {weight.device}"
    if q_nope.dtype not in DTYPES or {q_nope.dtype, q_pe.dtype, k_pe.dtype} != {c_kv.dtype}:
        return f"takes queries and caches in one dtype, bf16 or fp32, found {_dtypes(q_nope, q_pe, c_kv, k_pe)}"
    if (weight.dtype not in WEIGHTS and kind is None) or not weight.is_contiguous():
        return f"takes contiguous FP8, bf16 or four-bit weights, found {weight.dtype}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_nope, q_pe, c_kv, k_pe, weight)):
        return "computes no gradients"
    return _native.unavailable_reason()


def matrix(operation: str, weight: torch.Tensor, scale_inv: torch.Tensor | None) -> tuple[Matrix, object]:
    """``kv_b_proj [H·(n+v), r]`` for C, its scales if it is FP8, and what has to live as long.

    Raises:
        ValueError: a weight of another dtype, strided, or with scales of another shape.
    """
    if weight.dtype not in WEIGHTS or not weight.is_contiguous():
        raise ValueError(f"{operation}: found weights {weight.dtype}, wanted contiguous ones in {WEIGHTS}")
    if (scale_inv is not None) != (weight.dtype == torch.float8_e4m3fn):
        raise ValueError(f"{operation}: found weights {weight.dtype}, scales: {scale_inv is not None}")
    if scale_inv is not None:
        _native.check_scale(operation, weight, scale_inv)
        scale_inv = _native.fp32(scale_inv)
    return Matrix.of(weight, scale_inv), scale_inv


def check(
    operation: str,
    latents: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    weight: Matrix,
    others: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]],
) -> None:
    """Before C reads them: raise where a tensor is smaller than the others, or the weight's shape, say.

    Args:
        latents: ``q_nope [B, H, S, n]``, ``q_pe [B, H, S, p]``, ``c_kv [B, 1, T, r]`` and ``k_pe [B, 1, T, p]``.
        weight: ``[H·(n+v), r]``.
        others: further tensors by name, and the shapes wanted.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    q_nope, q_pe, c_kv, k_pe = latents
    batch, heads, tokens, nope = q_nope.shape
    length, rank, rope = *c_kv.shape[2:], k_pe.shape[3]
    wanted = {
        "q_pe": (q_pe, (batch, heads, tokens, rope)),
        "c_kv": (c_kv, (batch, 1, length, rank)),
        "k_pe": (k_pe, (batch, 1, length, rope)),
        **others,
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{operation}: {name} is {tuple(tensor.shape)}, wanted {shape}")
    found, rows = (weight.rows, weight.cols), heads * max(weight.rows // heads, nope + 1)
    if found != (rows, rank):
        raise ValueError(f"{operation}: weight is {found}, wanted {(rows, rank)}")
    if q_nope.dtype not in DTYPES or {q_nope.dtype, q_pe.dtype, k_pe.dtype} != {c_kv.dtype}:
        found = _dtypes(q_nope, q_pe, c_kv, k_pe)
        raise ValueError(f"{operation}: found queries and caches in {found}, wanted one dtype of {DTYPES}")


def _dtypes(*latents: torch.Tensor) -> str:
    return ", ".join(
        f"{name} {tensor.dtype}" for name, tensor in zip(("q_nope", "q_pe", "c_kv", "k_pe"), latents, strict=True)
    )


def call(function: str, latents: tuple, weight: Matrix, between: tuple[Any, ...], scaling: float) -> torch.Tensor:
    """What C writes, ``[B, S, H, v]``, of tensors that `check` has passed, with any strides but the last.

    Args:
        between: the function's arguments after the cache and before the weight.
    """
    q_nope, q_pe = (q if q.stride(3) == 1 else q.contiguous() for q in latents[:2])
    c_kv, k_pe = (c if c.stride()[2:] == (c.shape[3], 1) else c.contiguous() for c in latents[2:])
    batch, heads, tokens, nope = q_nope.shape
    out = attended(q_nope, weight.rows)
    if not out.numel():
        return out
    strides = (q.stride(dim) for q in (q_nope, q_pe) for dim in (0, 2, 1))
    shape = MlaShape(heads, nope, k_pe.shape[3], c_kv.shape[3], out.shape[3])
    _native.call(
        function,
        *(_native.DTYPES[q_nope.dtype], batch, tokens, c_kv.shape[2], byref(shape)),
        *(byref(Queries(q_nope.data_ptr(), q_pe.data_ptr(), *strides)), byref(LatentCache.of(c_kv, k_pe))),
        *(*between, byref(weight), scaling, out.data_ptr()),
    )
    return out


def attended(q_nope: torch.Tensor, rows: int) -> torch.Tensor:
    """``[B, S, H, v]`` without values; ``rows`` of ``kv_b_proj``: H·(n+v)."""
    batch, heads, tokens, nope = q_nope.shape
    return q_nope.new_empty((batch, tokens, heads, rows // heads - nope))
