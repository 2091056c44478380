"""Triton kernel of what lies between the first projections of latent attention and the cache.

Legend: B batch, q new tokens, r ``kv_lora_rank``, p the rope head dim, a ``q_lora_rank``.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes


@triton.jit
def normed(x_ptr, weight_ptr, eps, D: tl.constexpr, DP: tl.constexpr):
    """RMSNorm of one row of D features, in the row's dtype; zeros past them."""
    d = tl.arange(0, DP)
    m = d < D
    x = tl.load(x_ptr + d, mask=m, other=0.0).to(tl.float32)
    quotient = (x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=m, other=0.0).to(tl.float32)
    return (weight * quotient).to(x_ptr.dtype.element_ty)


@triton.jit
def latents(
    kv_ptr, norm_ptr, cos_ptr, sin_ptr, c_ptr, s_ptr, k_ptr, slot_ptr, q_ptr, q_norm_ptr, q_out_ptr, length, eps, q_eps,
    st_b, st_t, sc_b, sc_t, ss_b, ss_t, sk_b, sk_t, R: tl.constexpr, P: tl.constexpr, A: tl.constexpr, RP: tl.constexpr,
    PP: tl.constexpr, AP: tl.constexpr, INTERLEAVE: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Of ``kv_a_proj``'s row [r + p]: c_kv normed and k_pe rotated, written to the caches' row ``slot[t]``.

    With CODES c_kv is written as E4M3, with the scales of tiles of 128. With A, ``q_a_proj``'s row [a] is normed too.
    grid (B · q, 2): the second axis is the latents, then the queries.
    """
    row = tl.program_id(0)
    b, t = row // length, row % length
    if tl.program_id(1) == 1:
        if A:
            at = row.to(tl.int64) * A
            a = tl.arange(0, AP)
            tl.store(q_out_ptr + at + a, normed(q_ptr + at, q_norm_ptr, q_eps, A, AP), mask=a < A)
    else:
        slot = tl.load(slot_ptr + t).to(tl.int64)
        x_p = kv_ptr + row.to(tl.int64) * (R + P)
        c_p = c_ptr + b.to(tl.int64) * sc_b + slot * sc_t
        c, r = normed(x_p, norm_ptr, eps, R, RP), tl.arange(0, RP)
        if CODES:
            TILE: tl.constexpr = 128 if RP > 128 else RP
            tile = tl.arange(0, RP // TILE)
            raw, scale = codes.encode_tiles(tl.reshape(c.to(tl.float32), (RP // TILE, TILE)), False, False)
            s_p = s_ptr + b.to(tl.int64) * ss_b + slot * ss_t
            tl.store(s_p + tile, scale, mask=tile * 128 < R)
            tl.store(c_p + r, tl.reshape(raw, (RP,)), mask=r < R)
        else:
            tl.store(c_p + r, c, mask=r < R)
        i = tl.arange(0, PP)
        m = i < P // 2
        first, second = i, i + P // 2
        if INTERLEAVE:
            first, second = 2 * i, 2 * i + 1
        x = tl.load(x_p + R + first, mask=m, other=0.0).to(tl.float32)
        y = tl.load(x_p + R + second, mask=m, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + b * st_b + t * st_t + i, mask=m, other=0.0)
        sin = tl.load(sin_ptr + b * st_b + t * st_t + i, mask=m, other=0.0)
        k_p = k_ptr + b.to(tl.int64) * sk_b + slot * sk_t
        tl.store(k_p + first, (x * cos - y * sin).to(k_ptr.dtype.element_ty), mask=m)
        tl.store(k_p + second, (x * sin + y * cos).to(k_ptr.dtype.element_ty), mask=m)
