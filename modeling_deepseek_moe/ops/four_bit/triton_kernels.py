"""Triton kernels of four-bit linear layers: codes and scales used as they lie in memory.

Legend: M rows of x, N output features, K input features, G groups of a row.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes
from modeling_deepseek_moe.ops import _triton_groups as groups


@triton.jit
def integers(word):
    """Eight codes of each uint32 word ``[N, W]``, the lowest nibble first, less 8, as bf16 ``[N, W, 8]``."""
    n: tl.constexpr = word.shape[0]
    w: tl.constexpr = word.shape[1]
    a, b = tl.reshape(codes.int4(word, 0), (n, w, 2)), tl.reshape(codes.int4(word, 1), (n, w, 2))
    c, d = tl.reshape(codes.int4(word, 2), (n, w, 2)), tl.reshape(codes.int4(word, 3), (n, w, 2))
    both = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(both, (n, w, 8))


@triton.jit
def looked_up(word, table_ptr, LOW_FIRST: tl.constexpr):
    """What the eight codes of each word ``[N, W]`` stand for in a table of sixteen, fp32 ``[N, W, 8]``."""
    i = tl.arange(0, 8)
    if not LOW_FIRST:
        i = i ^ 1
    return tl.load(table_ptr + ((word[:, :, None] >> (4 * i)[None, None, :]) & 15))


@triton.jit
def scales(s_ptr, absmax_ptr, map_ptr, offset_ptr, at, mask, KIND: tl.constexpr):
    """Scales number ``at`` in fp32. KIND: "plain", "e8m0" (exponents) or "nested" (codes of scales)."""
    s = tl.load(s_ptr + at, mask=mask, other=0)
    if KIND == "e8m0":
        # 2^-127, which the shifted bits cannot say, is a subnormal
        s = tl.where(s == 0, 0x00400000, s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif KIND == "nested":
        value = tl.load(map_ptr + s, mask=mask, other=0.0)
        s = value * tl.load(absmax_ptr + at // 256, mask=mask, other=0.0) + tl.load(offset_ptr)
    return s.to(tl.float32)


@triton.jit
def weight(
    w_ptr, s_ptr, absmax_ptr, map_ptr, offset_ptr, table_ptr, n, k0, N, K, DTYPE: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TABLE: tl.constexpr, LOW_FIRST: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """W[n, k0:k0 + BK] in DTYPE, rounded once from the fp32 product."""
    words = k0 // 8 + tl.arange(0, BK // 8)
    m = (n < N)[:, None] & (words < K // 8)[None, :]
    w = tl.load(w_ptr + n[:, None].to(tl.int64) * (K // 8) + words[None, :], mask=m, other=0).to(
        tl.uint32, bitcast=True
    )
    at = n[:, None].to(tl.int64) * (K // GROUP) + (words // (GROUP // 8))[None, :]
    s = scales(s_ptr, absmax_ptr, map_ptr, offset_ptr, at, m, SCALES)
    if TABLE:
        values = (looked_up(w, table_ptr, LOW_FIRST) * s[:, :, None]).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        values = integers(w) * s.to(tl.bfloat16)[:, :, None]  # the product of two bf16 is exact in fp32: rounded once
    else:
        values = (integers(w).to(tl.float32) * s[:, :, None]).to(DTYPE)
    return tl.reshape(values, (n.shape[0], BK))


@triton.jit
def few_rows(
    x_ptr, w_ptr, s_ptr, absmax_ptr, map_ptr, offset_ptr, table_ptr, bias_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, TABLE: tl.constexpr, LOW_FIRST: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x Wᵀ + bias. grid (ceil(N/BN), ceil(M/BM)). K is a whole number of groups."""
    dtype = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    x_p = x_ptr + m[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        x = tl.load(x_p + k0, mask=(m < M)[None, :] & (k0 + k < K)[:, None], other=0.0)
        w = weight(
            w_ptr, s_ptr, absmax_ptr, map_ptr, offset_ptr, table_ptr, n, k0, N, K, dtype, BK, GROUP, TABLE, LOW_FIRST, SCALES
        )  # fmt: skip
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_p = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_p, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def few_bf16_rows(
    x_ptr, w_ptr, s_ptr, absmax_ptr, map_ptr, offset_ptr, table_ptr, bias_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `few_rows`, of rows in bf16: groups of codes as factors, their scales on the sums. The table is `_triton_groups`'."""
    G: tl.constexpr = BK // GROUP
    W: tl.constexpr = GROUP // 8
    n0 = tl.program_id(0) * BN
    n = tl.arange(0, BN)
    here = n0 + n < N
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    table = groups.table_of(table_ptr, KIND, W)
    w_ptr += n0.to(tl.int64) * (K // 8)
    first = n0.to(tl.int64) * (K // GROUP)
    x_p = x_ptr + m[None, :].to(tl.int64) * K + k[:, None]
    sums = tl.zeros((G, BN, BM), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        w = groups.words_of(w_ptr, n, here, k0, K, BK, WHOLE)
        at, mask = groups.scale_places(n, here, k0, K, G, GROUP, WHOLE)
        s = scales(s_ptr, absmax_ptr, map_ptr, offset_ptr, first + at, mask, SCALES)
        x = tl.load(x_p + k0, mask=(m < M)[None, :] & (k0 + k < K)[:, None], other=0.0)
        x = groups.activations(x, KIND, G, W, BM)
        start = groups.offset(x, KIND, BN)
        sums += groups.scaled(tl.dot(groups.values(w, table, KIND, G, BN, W), x, start), s)
    y = tl.sum(sums, 0)
    if BIAS:
        y += tl.load(bias_ptr + n0 + n, mask=here, other=0.0).to(tl.float32)[:, None]
    y_p = y_ptr + m[None, :].to(tl.int64) * N + n0 + n[:, None]
    tl.store(y_p, y.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & here[:, None])


@triton.jit
def decode(
    w_ptr, s_ptr, absmax_ptr, map_ptr, offset_ptr, table_ptr, out_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TABLE: tl.constexpr, LOW_FIRST: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """out [N, K]. grid (ceil(K/BK), ceil(N/BN))."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k0 = tl.program_id(0) * BK
    k = k0 + tl.arange(0, BK)
    dtype = out_ptr.dtype.element_ty
    w = weight(
        w_ptr, s_ptr, absmax_ptr, map_ptr, offset_ptr, table_ptr, n, k0, N, K, dtype, BK, GROUP, TABLE, LOW_FIRST, SCALES
    )  # fmt: skip
    tl.store(out_ptr + n[:, None].to(tl.int64) * K + k[None, :], w, mask=(n < N)[:, None] & (k < K)[None, :])
