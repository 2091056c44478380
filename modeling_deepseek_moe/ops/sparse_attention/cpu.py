"""Attention over chosen latents on the CPU engine: each query reads the rows of the cache that its indices name."""

import torch

from modeling_deepseek_moe.ops import _latents
from modeling_deepseek_moe.ops._latents import unsupported_reason
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Matrix
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit

__all__ = ["attend", "attend_four_bit", "unsupported_reason"]

NAME = "sparse_attention"


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
    matrix, kept = _latents.matrix(NAME, weight, scale_inv)
    found = _run(q_nope, q_pe, c_kv, k_pe, indices, matrix, scaling)
    del kept
    return found


def _attend_four_bit(q_nope, q_pe, c_kv, k_pe, indices, codes, scales, kind: str, scaling: float) -> torch.Tensor:
    """As `_attend`, of ``kv_b_proj``'s codes of four bits and `four_bit.cpu.parts_of` their scales."""
    weight, kept = four_bit.matrix(NAME, kind, codes, four_bit.scales_of(scales))
    found = _run(q_nope, q_pe, c_kv, k_pe, indices, weight, scaling)
    del kept
    return found


def _run(q_nope, q_pe, c_kv, k_pe, indices, weight: Matrix, scaling: float) -> torch.Tensor:
    latents, length = (q_nope, q_pe, c_kv, k_pe), c_kv.shape[2]
    shape = q_nope.shape[0], q_nope.shape[2], max(indices.shape[-1], 1)
    _latents.check(NAME, latents, weight, {"indices": (indices, shape)})
    if indices.dtype != torch.int32 or length < 1:
        raise ValueError(f"{NAME}: indices in {indices.dtype} of {length} rows, wanted int32 and a row")
    indices = indices.contiguous()
    return _latents.call("dsm_sparse_attention", latents, weight, (indices.data_ptr(), indices.shape[2]), scaling)


attend = define(
    "sparse_attention(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor indices, Tensor weight, "
    "Tensor? scale_inv, float scaling) -> Tensor",
    _attend,
    lambda q_nope, q_pe, c_kv, k_pe, indices, weight, *rest: _latents.attended(q_nope, weight.shape[0]),
)
attend_four_bit = define(
    "sparse_attention_four_bit(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor indices, Tensor codes, "
    "Tensor[] scales, str kind, float scaling) -> Tensor",
    _attend_four_bit,
    lambda q_nope, q_pe, c_kv, k_pe, indices, codes, *rest: _latents.attended(q_nope, codes.shape[0]),
)
