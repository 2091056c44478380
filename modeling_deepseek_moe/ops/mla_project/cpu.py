"""Everything before latent attention on the CPU engine: projections, norms and rotation of a few tokens in one call."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Matrix, MlaProjections, MlaShape, Norm

FEW_TOKENS = 8
WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn)  # the latter in blocks of 128 x 128


def _project(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    norms: list[torch.Tensor],
    eps: list[float],
    heads: int,
    rank: int,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        x: ``[B, q, D]``.
        cos, sin: ``[B or 1, q, p/2]`` in fp32.
        weights: of ``q_proj`` (or ``q_a_proj`` and ``q_b_proj``) and ``kv_a_proj_with_mqa``.
        scales: theirs, none at all for bf16.
        norms, eps: of ``q_a_layernorm``, where there is one, and ``kv_a_layernorm``.

    Returns:
        ``q [B, q, H·(n+p)]`` with p rotated features after each head's n, ``c_kv [B, q, r]``, ``k_pe [B, q, p]``.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    *first, last, _ = weights
    (batch, length, _), rope = x.shape, 2 * cos.shape[-1]
    q, c_kv, k_pe = _results(x, last, cos, rank)
    _check(x, cos, sin, weights, scales, norms, eps, heads, rank)
    if not x.numel():
        return q, c_kv, k_pe
    x = x.contiguous()
    cos, sin = (table.float().expand(batch, -1, -1).contiguous() for table in (cos, sin))
    weights, norms = [w.contiguous() for w in weights], [n.contiguous() for n in norms]
    scales = [_native.fp32(s) for s in scales] or [None] * len(weights)
    matrices = [Matrix.of(*pair) for pair in zip(weights, scales, strict=True)]
    made_norms = [Norm(norm.data_ptr(), epsilon) for norm, epsilon in zip(norms, eps, strict=True)]
    if not first:
        matrices, made_norms = [Matrix(), *matrices], [Norm(), *made_norms]
    shape = MlaShape(heads, last.shape[0] // heads - rope, rope, rank, 0, interleave)
    _native.call(
        "dsm_mla_project",
        *(_native.DTYPES[x.dtype], x.data_ptr(), batch * length, byref(shape)),
        *(byref(MlaProjections(*matrices, *made_norms)), cos.data_ptr(), sin.data_ptr()),
        *(q.data_ptr(), c_kv.data_ptr(), k_pe.data_ptr()),
    )
    return q, c_kv, k_pe


def _check(x, cos, sin, weights, scales, norms, eps, heads: int, rank: int) -> None:
    """Refuse what does not fit each other, before C reads it by address; arguments as of `_project`."""
    *first, last, latent = weights
    batch, length, hidden = x.shape
    rope = 2 * cos.shape[-1]
    fits = (
        len(weights) in (2, 3)
        and len(norms) == len(eps) == len(weights) - 1
        and all(weight.ndim == 2 and weight.dtype == latent.dtype in WEIGHTS for weight in weights)
        and (first or [last])[0].shape[1] == latent.shape[1] == hidden
        and (not first or (last.shape[1] == first[0].shape[0] == norms[0].shape[0]))
        and latent.shape[0] == rank + rope
        and norms[-1].shape == (rank,)
        and last.shape[0] % heads == 0
        and last.shape[0] // heads > rope
        and cos.shape == sin.shape == (cos.shape[0] if cos.shape[0] == batch else 1, length, cos.shape[-1])
        and len(scales) == (len(weights) if latent.dtype == torch.float8_e4m3fn else 0)
        and all(s.shape == tuple(-(-n // 128) for n in w.shape) for w, s in zip(weights, scales, strict=False))
        and x.numel() <= FEW_TOKENS * hidden
        and all(norm.dtype == x.dtype for norm in norms)
    )
    if not fits:
        found = ", ".join(map(_native.describe, (x, cos, *weights, *scales, *norms)))
        raise ValueError(f"mla_project: found tensors that do not fit {heads} heads and rank {rank}: {found}")


def _results(x, query, cos, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length = x.shape[:2]
    return tuple(x.new_empty((batch, length, size)) for size in (query.shape[0], rank, 2 * cos.shape[-1]))


project = define(
    "mla_project(Tensor x, Tensor cos, Tensor sin, Tensor[] weights, Tensor[] scales, Tensor[] norms, float[] eps, "
    "int heads, int rank, bool interleave) -> (Tensor, Tensor, Tensor)",
    _project,
    lambda x, cos, sin, weights, scales, norms, eps, heads, rank, interleave: _results(x, weights[-2], cos, rank),
)
