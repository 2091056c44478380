"""A few new tokens over the latent cache on the CPU engine: one call, in which the cache is read once for all heads."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _latents, _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Mask, Matrix
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit

NAME = "mla_decode"
FEW_TOKENS = 8  # of a sequence


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
    if not 1 <= q_nope.shape[2] <= FEW_TOKENS:
        return f"is for one new token to {FEW_TOKENS}, found {q_nope.shape[2]}"
    if mask is not None and mask.shape[1] != 1:
        return f"takes one mask for all heads, found {mask.shape[1]}"
    if mask is not None and mask.shape[2] != q_nope.shape[2]:
        return f"takes a mask with a row for each token, found {mask.shape[2]}"
    return _latents.unsupported_reason(q_nope, q_pe, c_kv, k_pe, weight, kind)


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
    matrix, kept = _latents.matrix(NAME, weight, scale_inv)
    found = _attend(q_nope, q_pe, c_kv, k_pe, mask, matrix, scaling)
    del kept
    return found


def _decode_four_bit(q_nope, q_pe, c_kv, k_pe, mask, codes, scales, kind: str, scaling: float) -> torch.Tensor:
    """As `_decode`, of ``kv_b_proj``'s codes of four bits and `four_bit.cpu.parts_of` their scales."""
    weight, kept = four_bit.matrix(NAME, kind, codes, four_bit.scales_of(scales))
    found = _attend(q_nope, q_pe, c_kv, k_pe, mask, weight, scaling)
    del kept
    return found


def _attend(q_nope, q_pe, c_kv, k_pe, mask, weight: Matrix, scaling: float) -> torch.Tensor:
    latents, (batch, _, tokens, _), length = (q_nope, q_pe, c_kv, k_pe), q_nope.shape, c_kv.shape[2]
    others: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
    if mask is not None:
        others["mask"] = mask, (batch if mask.shape[0] == batch else 1, 1, tokens, mask.shape[3])
    _latents.check(NAME, latents, weight, others)
    if length < tokens or tokens < 1:
        raise ValueError(f"{NAME}: {tokens} of {length} tokens")
    if mask is not None:
        if mask.shape[3] < length:
            raise ValueError(f"{NAME}: the mask covers {mask.shape[3]} tokens, the cache holds {length}")
        mask = _native.additive(mask[:, 0, -tokens:, :length])
    return _latents.call("dsm_mla_decode", latents, weight, (byref(Mask.of(mask)),), scaling)


decode = define(
    "mla_decode(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor? mask, Tensor weight, Tensor? scale_inv, "
    "float scaling) -> Tensor",
    _decode,
    lambda q_nope, q_pe, c_kv, k_pe, mask, weight, *rest: _latents.attended(q_nope, weight.shape[0]),
)
decode_four_bit = define(
    "mla_decode_four_bit(Tensor q_nope, Tensor q_pe, Tensor c_kv, Tensor k_pe, Tensor? mask, Tensor codes, "
    "Tensor[] scales, str kind, float scaling) -> Tensor",
    _decode_four_bit,
    lambda q_nope, q_pe, c_kv, k_pe, mask, codes, *rest: _latents.attended(q_nope, codes.shape[0]),
)
