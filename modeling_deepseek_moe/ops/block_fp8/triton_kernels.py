"""Triton kernels of block-scaled FP8: products of few rows and of many, casts.

None needs a conversion that SM80 lacks: codes become bf16 by shifts and masks, two in a register where it matters.

Legend: M rows of x, N output features, K input features.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes


@triton.jit
def columns(x_ptr, m, k2, mask, K):
    """Columns 2·k2 and 2·k2 + 1 of rows m of x, each ``[k2, m]``: as halves of words where two of them share one."""
    dtype = x_ptr.dtype.element_ty
    if dtype == tl.float32:
        x_p = x_ptr + m[None, :].to(tl.int64) * K + 2 * k2[:, None]
        even, odd = tl.load(x_p, mask=mask, other=0.0), tl.load(x_p + 1, mask=mask, other=0.0)
    else:
        words = x_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        x = tl.load(words + m[None, :].to(tl.int64) * (K // 2) + k2[:, None], mask=mask, other=0)
        even = (x & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        odd = (x >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return even, odd


@triton.jit
def product(
    x_ptr, w_ptr, s_ptr, m, n0, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):
    """``W[n0:n0 + BN] x[m]ᵀ``, fp32 ``[BN, BM]``; the sum over a block's k runs over even k, then odd k. K % 4 == 0."""
    dtype = x_ptr.dtype.element_ty
    n = n0 + tl.arange(0, BN)
    mm, nm = m < M, n < N
    words = K // 4
    k4, k2 = tl.arange(0, BK // 4), tl.arange(0, BK // 2)
    w_p = w_ptr + n[:, None].to(tl.int64) * words + k4[None, :]
    s_p = s_ptr + (n0 // 128) * ((K + 127) // 128)
    acc = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        even, odd = columns(x_ptr, m, k0 // 2 + k2, mm[None, :] & (k0 + 2 * k2 < K)[:, None], K)
        w = tl.load(w_p + k0 // 4, mask=nm[:, None] & (k0 // 4 + k4 < words)[None, :], other=0).to(
            tl.uint32, bitcast=True
        )
        part = tl.dot(codes.e4m3(w, False).to(dtype), even, input_precision="ieee")
        acc += tl.dot(codes.e4m3(w, True).to(dtype), odd, part, input_precision="ieee") * tl.load(s_p + k0 // 128)
    return acc


@triton.jit
def few_rows(
    x_ptr, w_ptr, s_ptr, bias_ptr, y_ptr, w2_ptr, s2_ptr, y2_ptr, M, N, N2, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x Wᵀ + bias, and with SECOND y2 [M, N2] = x W2ᵀ. grid (ceil(N/BN) + ceil(N2/BN), ceil(M/BM))."""
    block = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.cdiv(N, BN)
    if SECOND and block >= first:
        n0 = (block - first) * BN
        n = n0 + tl.arange(0, BN)
        acc = product(x_ptr, w2_ptr, s2_ptr, m, n0, M, N2, K, BM, BN, BK, STAGES)
        y_p = y2_ptr + m[None, :].to(tl.int64) * N2 + n[:, None]
        tl.store(y_p, acc.to(y2_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N2)[:, None])
    else:
        n0 = block * BN
        n = n0 + tl.arange(0, BN)
        acc = product(x_ptr, w_ptr, s_ptr, m, n0, M, N, K, BM, BN, BK, STAGES)
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        y_p = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(y_p, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def gate_up(
    x_ptr, g_ptr, gs_ptr, u_ptr, us_ptr, h_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """h [M, N] = silu(x Gᵀ) · x Uᵀ. grid (ceil(N/BN), ceil(M/BM))."""
    dtype = x_ptr.dtype.element_ty
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    mm, nm = m < M, n < N
    words, cols = K // 4, (K + 127) // 128
    k4, k2 = tl.arange(0, BK // 4), tl.arange(0, BK // 2)
    inner = n[:, None].to(tl.int64) * words + k4[None, :]
    gate, up = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        even, odd = columns(x_ptr, m, k0 // 2 + k2, mm[None, :] & (k0 + 2 * k2 < K)[:, None], K)
        wm = nm[:, None] & (k0 // 4 + k4 < words)[None, :]
        g = tl.load(g_ptr + inner + k0 // 4, mask=wm, other=0).to(tl.uint32, bitcast=True)
        u = tl.load(u_ptr + inner + k0 // 4, mask=wm, other=0).to(tl.uint32, bitcast=True)
        at = (n0 // 128) * cols + k0 // 128
        part = tl.dot(codes.e4m3(g, False).to(dtype), even, input_precision="ieee")
        gate += tl.dot(codes.e4m3(g, True).to(dtype), odd, part, input_precision="ieee") * tl.load(gs_ptr + at)
        part = tl.dot(codes.e4m3(u, False).to(dtype), even, input_precision="ieee")
        up += tl.dot(codes.e4m3(u, True).to(dtype), odd, part, input_precision="ieee") * tl.load(us_ptr + at)
    h = gate / (1 + tl.exp(-gate)) * up
    tl.store(
        h_ptr + m[None, :].to(tl.int64) * N + n[:, None], h.to(h_ptr.dtype.element_ty), mask=mm[None, :] & nm[:, None]
    )


@triton.jit
def gemm(
    a_ptr, as_ptr, b_ptr, bs_ptr, c_ptr, M, N, K, sas_m, sas_t, sbs_n, sbs_t, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    B_ROWS: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """C [M, N] of codes A [M, K] and B [N, K]: each 128 products are summed, scaled twice, and added up in fp32.

    Scales of A [M, ceil(K/128)], of B [ceil(N/B_ROWS), ceil(K/128)], of any strides. grid (ceil(M/BM) * ceil(N/BN),).
    """
    pid, rows, cols = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    width = GROUP * cols
    first = (pid // width) * GROUP
    size = tl.minimum(rows - first, GROUP)
    m = (first + (pid % width) % size) * BM + tl.arange(0, BM)
    n = ((pid % width) // size) * BN + tl.arange(0, BN)
    mm, nm = m < M, n < N
    k, tiles = tl.arange(0, 128), tl.cdiv(K, 128)
    if NATIVE:
        a_ptr = a_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        b_ptr = b_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    a_p = a_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    b_p = b_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    as_p, bs_p = as_ptr + m * sas_m, bs_ptr + (n // B_ROWS) * sbs_n
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, tiles, num_stages=STAGES):
        km = i * 128 + k < K
        a = tl.load(a_p + i * 128, mask=mm[:, None] & km[None, :], other=0.0 if NATIVE else 0)
        b = tl.load(b_p + i * 128, mask=nm[None, :] & km[:, None], other=0.0 if NATIVE else 0)
        if not NATIVE:
            a, b = codes.e4m3_bytes(a), codes.e4m3_bytes(b)
        a_s, b_s = tl.load(as_p + i * sas_t, mask=mm, other=0.0), tl.load(bs_p + i * sbs_t, mask=nm, other=0.0)
        acc += tl.dot(a, b) * (a_s[:, None] * b_s[None, :])
    tl.store(
        c_ptr + m[:, None].to(tl.int64) * N + n[None, :],
        acc.to(c_ptr.dtype.element_ty),
        mask=mm[:, None] & nm[None, :],
    )


@triton.jit
def cast_tiles(
    x_ptr, codes_ptr, scale_ptr, R, K, sx_r, sx_k, ss_r, ss_t, BM: tl.constexpr, POWER: tl.constexpr, SWIGLU: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Codes [R, K] and scales [R, ceil(K/128)] of tiles of 1 x 128; of silu(x[:, :K]) · x[:, K:] with SWIGLU.

    See `encode_tiles`. grid (ceil(K/128), ceil(R/BM)).
    """
    tile = tl.program_id(0)
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tile * 128 + tl.arange(0, 128)
    m = (r < R)[:, None] & (k < K)[None, :]
    x_p = x_ptr + r[:, None].to(tl.int64) * sx_r + k[None, :].to(tl.int64) * sx_k
    x = tl.load(x_p, mask=m, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(x_p + K.to(tl.int64) * sx_k, mask=m, other=0.0).to(tl.float32)
        x = tl.div_rn(x, 1 + tl.exp(-x)) * up
    raw, scale = codes.encode_tiles(x, POWER, NATIVE)
    tl.store(codes_ptr + r[:, None].to(tl.int64) * K + k[None, :], raw, mask=m)
    tl.store(scale_ptr + r * ss_r + tile * ss_t, scale, mask=r < R)


@triton.jit
def decode_blocks(
    codes_ptr, scale_ptr, out_ptr, N, K, sc_n, ss_n, ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out [N, K] = code · scale, scales [ceil(N/ROWS), ceil(K/128)]. NaN codes stay NaN. grid (ceil(N/BM), ceil(K/BK)).

    Rows of codes and of scales are ``sc_n`` and ``ss_n`` apart.
    """
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    m = (n < N)[:, None] & (k < K)[None, :]
    row = n[:, None].to(tl.int64)
    raw = tl.load(codes_ptr + row * sc_n + k[None, :], mask=m, other=0)
    s = tl.load(scale_ptr + (n[:, None] // ROWS).to(tl.int64) * ss_n + k[None, :] // 128, mask=m, other=0.0)
    v = tl.where((raw & 0x7F) == 0x7F, float("nan"), codes.e4m3_bytes(raw).to(tl.float32)) * s
    tl.store(out_ptr + row * K + k[None, :], v.to(out_ptr.dtype.element_ty), mask=m)
