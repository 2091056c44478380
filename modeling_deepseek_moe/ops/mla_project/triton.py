"""Between the first projections of latent attention and the cache, on a GPU: norms, rotation and the write in one kernel."""

import torch

from modeling_deepseek_moe.ops import _latent_rows, _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import kernels, launch, padded


def unsupported_reason(kv: torch.Tensor, c_kv: torch.Tensor, k_pe: torch.Tensor) -> str | None:
    """Why the kernel cannot make latents; ``None`` if it can. For the shapes see `latents`."""
    if c_kv.stride(3) != 1 or k_pe.stride(3) != 1:
        return "needs caches with contiguous rows"
    return _triton.unsupported_reason(kv, c_kv, k_pe) or _triton.unsupported_floats(kv, c_kv, k_pe)


def _latents(
    kv: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    slots: torch.Tensor,
    q_a: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    q_eps: float,
    interleave: bool,
) -> torch.Tensor:
    """
    Args:
        kv: ``[B, q, r + p]``, what ``kv_a_proj_with_mqa`` yields; ``norm [r]`` is the weight of its norm.
        cos, sin: ``[B or 1, q, p/2]`` fp32.
        c_kv, k_pe: the caches' buffers ``[B, 1, capacity, r]`` and ``[B, 1, capacity, p]``, of which the rows ``slots [q]``
            (int64, on the device) are written. ``c_kv`` of bytes is as `_latent_rows` lays them out.
        q_a, q_norm: ``[B, q, a]``, what ``q_a_proj`` yields, and the weight ``[a]`` of its norm.

    Returns:
        ``q_a`` normed, or an empty tensor.
    """
    (batch, length, width), rope = kv.shape, k_pe.shape[3]
    rank, in_codes = width - rope, c_kv.dtype == torch.uint8
    fits = (
        norm.shape == (rank,)
        and c_kv.shape[3] == (_latent_rows.row_bytes(rank) if in_codes else rank)
        and c_kv.shape[:2] == k_pe.shape[:2] == (batch, 1)
        and c_kv.shape[2] == k_pe.shape[2]
        and slots.shape == (length,)
        and cos.shape == sin.shape == (cos.shape[0] if cos.shape[0] == batch else 1, length, rope // 2)
        and cos.dtype == sin.dtype == torch.float32
        and (q_a is None) == (q_norm is None)
        and (q_a is None or (q_a.shape[:2] == kv.shape[:2] and q_norm.shape == q_a.shape[2:]))
    )
    if not fits:
        shapes = [None if t is None else list(t.shape) for t in (kv, norm, cos, c_kv, k_pe, slots, q_a, q_norm)]
        raise ValueError(f"latents: found kv, norm, cos, c_kv, k_pe, slots, q_a and q_norm that do not fit: {shapes}")
    c_kv, scales = _latent_rows.codes_and_scales(c_kv, rank) if in_codes else (c_kv, None)
    kv, norm, cos, sin = kv.contiguous(), norm.contiguous(), cos.contiguous(), sin.contiguous()
    out = kv.new_empty((0,) if q_a is None else q_a.shape)
    features = 0 if q_a is None else q_a.shape[2]
    launch(
        kernels("mla_project").latents,
        (batch * length, 1 if q_a is None else 2),
        kv.device,
        *(kv, norm, cos, sin, c_kv, scales, k_pe, slots, None if q_a is None else q_a.contiguous(), q_norm, out),
        *(length, eps, q_eps, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)),
        *(stride for cached in (c_kv, scales, k_pe) for stride in _latent_rows.strides(cached)),
        **dict(R=rank, P=rope, A=features, RP=padded(rank), PP=padded(rope // 2), AP=padded(max(features, 1))),
        **dict(INTERLEAVE=interleave, CODES=in_codes),
    )
    return out


latents = define(
    "triton_latents(Tensor kv, Tensor norm, float eps, Tensor cos, Tensor sin, Tensor(a!) c_kv, Tensor(b!) k_pe, Tensor slots, "
    "Tensor? q_a, Tensor? q_norm, float q_eps, bool interleave) -> Tensor",
    None,
    lambda kv, norm, eps, cos, sin, c_kv, k_pe, slots, q_a, *_: kv.new_empty((0,) if q_a is None else q_a.shape),
    _latents,
)
