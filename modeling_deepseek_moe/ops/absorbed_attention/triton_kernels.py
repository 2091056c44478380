"""Triton kernels of one new token over the latent cache.

`absorb` takes the queries into the latent space (and rotates them, if it is given the tables), `split` attends to a part of
the keys for a block of heads, `merge` joins the parts and leaves the latent space. Keys of row b are
``bounds[b, 0] <= t < bounds[b, 1]``: neither left padding nor a static cache's unused end is read.

Legend: B batch, H heads, r ``kv_lora_rank``, n / p / v the nope, rope and value head dims, S splits of the keys.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes


@triton.jit
def weights(w_ptr, s_ptr, row, col, mask, R, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """``W[row, col]`` of ``kv_b_proj [·, r]`` in the queries' dtype, rounded once from code times scale."""
    w = tl.load(w_ptr + row * R + col, mask=mask, other=0)
    if FP8:
        s = tl.load(s_ptr + (row // 128) * ((R + 127) // 128) + col // 128, mask=mask, other=0.0)
        w = (codes.e4m3_bytes(w).to(tl.float32) * s).to(DTYPE)
    return w.to(DTYPE)


@triton.jit
def absorb(
    qn_ptr, qp_ptr, cos_ptr, sin_ptr, w_ptr, s_ptr, latent_ptr, pe_ptr, B, H, sn_b, sn_h, sp_b, sp_h, st_b,
    N: tl.constexpr, V: tl.constexpr, P: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, PP: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, FP8: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    """latent [B, H, r] = q_nope W_UK of a head; pe [B, H, p] = q_pe rotated. grid (H, ceil(r/BR), ceil(B/BM))."""
    h, block = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2) * BM + tl.arange(0, BM)
    bm = b < B
    n, r = tl.arange(0, NP), block * BR + tl.arange(0, BR)
    nm, rm = n < N, r < R
    dtype = qn_ptr.dtype.element_ty
    q = tl.load(qn_ptr + b[:, None] * sn_b + h * sn_h + n[None, :], mask=bm[:, None] & nm[None, :], other=0.0)
    row = h * (N + V) + n[:, None]
    w = weights(w_ptr, s_ptr, row, r[None, :], nm[:, None] & rm[None, :], R, FP8, dtype)
    latent = tl.dot(q, w, input_precision="ieee").to(dtype)
    tl.store(latent_ptr + (b[:, None] * H + h) * R + r[None, :], latent, mask=bm[:, None] & rm[None, :])
    if ROTATE:  # noqa: SIM102 - known when the kernel is compiled, the other when it runs
        if block == 0:
            i = tl.arange(0, PP)
            m = bm[:, None] & (i < P // 2)[None, :]
            first, second = (2 * i, 2 * i + 1) if INTERLEAVE else (i, i + P // 2)
            x_p = qp_ptr + b[:, None] * sp_b + h * sp_h
            x = tl.load(x_p + first[None, :], mask=m, other=0.0).to(tl.float32)
            y = tl.load(x_p + second[None, :], mask=m, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + b[:, None] * st_b + i[None, :], mask=m, other=0.0)
            sin = tl.load(sin_ptr + b[:, None] * st_b + i[None, :], mask=m, other=0.0)
            out_p = pe_ptr + (b[:, None] * H + h) * P
            tl.store(out_p + first[None, :], (x * cos - y * sin).to(dtype), mask=m)
            tl.store(out_p + second[None, :], (x * sin + y * cos).to(dtype), mask=m)


@triton.jit
def decoded(raw, s_p, t, tm, ss_t, R: tl.constexpr, RP: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Latents [BN, RP] of their codes, each rounded once from code times scale. NATIVE: SM89's conversion."""
    TILE: tl.constexpr = 128 if RP > 128 else RP
    tile = tl.arange(0, RP // TILE)
    s = tl.load(s_p + t[:, None] * ss_t + tile[None, :], mask=tm[:, None] & (tile * 128 < R)[None, :], other=0.0)
    values = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32) if NATIVE else codes.e4m3_bytes(raw).to(tl.float32)
    values = tl.reshape(values, (raw.shape[0], RP // TILE, TILE)) * s[:, :, None]
    return tl.reshape(values.to(DTYPE), raw.shape)


@triton.jit
def part(begin, end, BN: tl.constexpr):
    """The first of the keys ``begin <= t < end`` that this program attends to, and one past its last."""
    per = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(1)), BN) * BN
    lo = begin + tl.program_id(1) * per
    return lo, tl.minimum(lo + per, end)


@triton.jit
def weighed(s, c, top, total, acc):
    """Of scores ``s [BH, BN]`` of latents ``c [BN, RP]``, in log2, and those before: the largest, the sum of weights, weights times latents."""
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    w = tl.exp2(s - shift[:, None])
    fade = tl.exp2(top - shift)
    return new, total * fade + tl.sum(w, 1), tl.dot(w.to(c.dtype), c, acc * fade[:, None], input_precision="ieee")


@triton.jit
def keep(o_ptr, lse_ptr, row, r, hm, top, total, acc, R: tl.constexpr):
    """Store what `weighed` left at the end: divided, and the sum's logarithm."""
    seen = total != 0  # NaN is to be seen
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    tl.store(o_ptr + row[:, None].to(tl.int64) * R + r[None, :], acc, mask=hm[:, None] & (r < R)[None, :])
    tl.store(lse_ptr + row, tl.where(seen, top + tl.log2(total), float("-inf")), mask=hm)


@triton.jit
def split(
    q_ptr, pe_ptr, c_ptr, s_ptr, k_ptr, mask_ptr, bounds_ptr, o_ptr, lse_ptr, scale_log2, H, length, sp_b, sp_h, sc_b, sc_t,
    ss_b, ss_t, sk_b, sk_t, sm_b, R: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, BOUNDS: tl.constexpr, MASK: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """o [B, S, H, r] fp32, already divided, and lse [B, S, H] in log2, -inf where no key was seen. grid (ceil(H/BH), S, B).

    MASK: "none", "bool" (other than 0 attends) or "add". CODES: latents are E4M3, with the scales of tiles of 128.
    """
    b = tl.program_id(2)
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    hm = h < H
    r, p = tl.arange(0, RP), tl.arange(0, PP)
    begin, end = 0, length
    if BOUNDS:
        begin, end = tl.load(bounds_ptr + 2 * b), tl.load(bounds_ptr + 2 * b + 1)
    lo, hi = part(begin, end, BN)
    row = (b * tl.num_programs(1) + tl.program_id(1)) * H + h
    if lo >= hi:
        tl.store(lse_ptr + row, tl.full((BH,), float("-inf"), tl.float32), mask=hm)
        return
    q = tl.load(q_ptr + (b * H + h[:, None]) * R + r[None, :], mask=hm[:, None] & (r < R)[None, :], other=0.0)
    q_pe = tl.load(pe_ptr + b * sp_b + h[:, None] * sp_h + p[None, :], mask=hm[:, None] & (p < P)[None, :], other=0.0)
    c_p = c_ptr + b.to(tl.int64) * sc_b
    s_p = s_ptr + b.to(tl.int64) * ss_b if CODES else s_ptr
    k_p = k_ptr + b.to(tl.int64) * sk_b
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, RP), tl.float32)
    for t0 in tl.range(lo, hi, BN, num_stages=STAGES):
        t = t0 + tl.arange(0, BN)
        tm = t < hi
        c = tl.load(c_p + t[:, None] * sc_t + r[None, :], mask=tm[:, None] & (r < R)[None, :], other=0)
        if CODES:
            c = decoded(c, s_p, t, tm, ss_t, R, RP, NATIVE, q.dtype)
        k = tl.load(k_p + t[:, None] * sk_t + p[None, :], mask=tm[:, None] & (p < P)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(c), input_precision="ieee")
        s = tl.dot(q_pe, tl.trans(k), s, input_precision="ieee") * scale_log2
        if MASK == "bool":
            tm = tm & (tl.load(mask_ptr + b * sm_b + t, mask=tm, other=0) != 0)
        if MASK == "add":
            s += tl.load(mask_ptr + b * sm_b + t, mask=tm, other=0.0).to(tl.float32)[None, :] * 1.4426950408889634
        s = tl.where(tm[None, :], s, float("-inf"))
        top, total, acc = weighed(s, c, top, total, acc)
    keep(o_ptr, lse_ptr, row, r, hm, top, total, acc, R)


@triton.jit
def merge(
    o_ptr, lse_ptr, w_ptr, s_ptr, out_ptr, B, H, S, N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
    BV: tl.constexpr, BK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """out [B, H, v] = W_UV of a head times the joined parts; zeros where no key was seen. grid (H, ceil(v/BV), ceil(B/BM))."""
    h = tl.program_id(0)
    b = tl.program_id(2) * BM + tl.arange(0, BM)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    bm, vm = b < B, v < V
    dtype = out_ptr.dtype.element_ty
    top = tl.full((BM,), float("-inf"), tl.float32)
    for s in range(S):
        top = tl.maximum(top, tl.load(lse_ptr + (b * S + s) * H + h, mask=bm, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BM,), tl.float32)
    for s in range(S):
        total += tl.exp2(tl.load(lse_ptr + (b * S + s) * H + h, mask=bm, other=float("-inf")) - top)
    total = tl.where(total != 0, total, 1.0)
    out = tl.zeros((BM, BV), tl.float32)
    for k0 in range(0, R, BK):
        k = k0 + tl.arange(0, BK)
        km = k < R
        latent = tl.zeros((BM, BK), tl.float32)
        for s in range(S):
            part = (b * S + s) * H + h
            lse = tl.load(lse_ptr + part, mask=bm, other=float("-inf"))
            seen = (lse != float("-inf"))[:, None] & km[None, :]
            o = tl.load(o_ptr + part[:, None].to(tl.int64) * R + k[None, :], mask=seen, other=0.0)
            latent += o * tl.exp2(lse - top)[:, None]
        latent = latent / total[:, None]
        row = h * (N + V) + N + v[:, None]
        w = weights(w_ptr, s_ptr, row, k[None, :], vm[:, None] & km[None, :], R, FP8, dtype)
        out = tl.dot(latent.to(dtype), tl.trans(w), out, input_precision="ieee")
    tl.store(out_ptr + (b[:, None] * H + h) * V + v[None, :], out.to(dtype), mask=bm[:, None] & vm[None, :])


@triton.jit
def find_bounds(mask_ptr, bounds_ptr, length, sm_b, BN: tl.constexpr):
    """bounds[b] = first key that row b of a boolean mask attends to, and one past the last; 0, 0 for none. grid (B,)."""
    b = tl.program_id(0)
    first = tl.full((BN,), 2147483647, tl.int32)
    last = tl.zeros((BN,), tl.int32)
    for t0 in range(0, length, BN):
        t = t0 + tl.arange(0, BN)
        seen = tl.load(mask_ptr + b * sm_b + t, mask=t < length, other=0) != 0
        first = tl.minimum(first, tl.where(seen, t, 2147483647))
        last = tl.maximum(last, tl.where(seen, t + 1, 0))
    end = tl.max(last, 0)
    tl.store(bounds_ptr + 2 * b, tl.where(end > 0, tl.min(first, 0), 0))
    tl.store(bounds_ptr + 2 * b + 1, end)
