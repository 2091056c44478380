"""Products of rows sorted by expert with codes, as Triton kernels: Fprop, and Dgrad, of which no weight is ever made whole.

A tile is decoded in registers into the order of its columns, and is the left factor of Fprop, the right one of Dgrad. Formats
are those of `triton_kernels`; a matrix is one of every expert, which lie a stride apart, so gate and up may be stacked or not.

Legend: S slots, R row among them, E experts, N rows and K columns of a matrix.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes
from modeling_deepseek_moe.ops.experts.triton_kernels import step_scales, stored, tile_of


@triton.jit
def in_order(words, table_ptr, KIND: tl.constexpr):
    """Words ``[R, W]`` of codes as bf16 in the order of their columns, without scales; a thread keeps what it has."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if KIND == "fp8":
        out = tl.reshape(tl.join(codes.e4m3(words, 0), codes.e4m3(words, 1)), (R, 4 * W))
    else:
        if KIND == "int4":
            a, b, c, d = codes.int4(words, 0), codes.int4(words, 1), codes.int4(words, 2), codes.int4(words, 3)
        elif KIND == "mxfp4":
            a, b, c, d = codes.e2m1(words, 0), codes.e2m1(words, 1), codes.e2m1(words, 2), codes.e2m1(words, 3)
        else:
            a, b = codes.by_table(words, table_ptr, 0), codes.by_table(words, table_ptr, 1)
            c, d = codes.by_table(words, table_ptr, 2), codes.by_table(words, table_ptr, 3)
        both = tl.join(tl.join(a, c), tl.join(b, d))  # [R, 2W, i, j] of parts 2i + j
        if KIND == "nf4":  # a part's two codes are neighbours
            both = tl.permute(tl.reshape(both, (R, W, 2, 2, 2)), (0, 1, 3, 4, 2))
        out = tl.reshape(both, (R, 8 * W))
    return out


@triton.jit
def forward(
    a_ptr, w_ptr, s_ptr, table_ptr, order_ptr, ends_ptr, out_ptr, E, N, K, W_STRIDE, S_STRIDE, OUT_STRIDE,
    TOP_K: tl.constexpr, BY_TOKEN: tl.constexpr, BY_SLOT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[r] = a[r] · W_eᵀ``, ``[S, N]``. Grid: tiles, ⌈N / BN⌉; BN divides 128.

    ``BY_TOKEN``: a has a row for each token; ``BY_SLOT``: out is in the slots' order.
    """
    e, start, stop = tile_of(ends_ptr, E, tl.program_id(0), BM, EXPERTS)
    if e >= E:
        return
    row = start + tl.arange(0, BM)
    live = row < stop
    slot = tl.load(order_ptr + row, mask=live, other=0)
    a_row = slot // TOP_K if BY_TOKEN else row
    n0 = tl.program_id(1) * BN
    n = n0 + tl.arange(0, BN)
    here = n < N
    PER: tl.constexpr = 4 if KIND == "fp8" else 8
    k = tl.arange(0, BK)
    a_at = a_ptr + a_row.to(tl.int64)[None, :] * K + k[:, None]
    w_ptr += e.to(tl.int64) * W_STRIDE
    s_ptr += e.to(tl.int64) * S_STRIDE
    if KIND == "fp8":
        s_ptr += (n0 // 128) * tl.cdiv(K, 128)
    y = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        a = tl.load(a_at + k0, mask=live[None, :] & (k0 + k < K)[:, None], other=0.0)
        words = stored(w_ptr, n, here, k0 // PER, K // PER, BK // PER, KIND)
        scales = step_scales(s_ptr, n, here, k0, K, BK, 1, KIND, GROUP)
        if KIND == "fp8":
            y += tl.dot(in_order(words, table_ptr, KIND), a) * scales
        else:
            y = tl.dot(in_order(words, table_ptr, KIND) * scales, a, y)
    out_row = slot if BY_SLOT else row
    out_at = out_ptr + out_row.to(tl.int64)[None, :] * OUT_STRIDE + n[:, None]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=live[None, :] & here[:, None])


@triton.jit
def summed(
    total, a_rows, live, w_ptr, s_ptr, table_ptr, k0, N, K, KIND: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``total [R, BN]`` and ``a [R, N] · W[:, k0:k0 + BN]``."""
    PER: tl.constexpr = 4 if KIND == "fp8" else 8
    for n0 in tl.range(0, N, BK, num_stages=STAGES):
        n = n0 + tl.arange(0, BK)
        inside = n < N
        a = tl.load(a_rows + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        words = stored(w_ptr, n, inside, k0 // PER, K // PER, BN // PER, KIND)
        if KIND == "fp8":
            scale = step_scales(s_ptr + (n0 // 128) * tl.cdiv(K, 128), n, inside, k0, K, BN, 1, KIND, GROUP)
            total += tl.dot(a, in_order(words, table_ptr, KIND)) * scale
        else:
            scales = step_scales(s_ptr, n, inside, k0, K, BN, 1, KIND, GROUP)
            total = tl.dot(a, in_order(words, table_ptr, KIND) * scales, total)
    return total


@triton.jit
def backward(
    a_ptr, w_ptr, s_ptr, more_w_ptr, more_s_ptr, table_ptr, order_ptr, ends_ptr, out_ptr, E, N, K, W_STRIDE, S_STRIDE, A_STRIDE,
    TOP_K: tl.constexpr, BY_TOKEN: tl.constexpr, BY_SLOT: tl.constexpr, MORE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[r] = a[r] · W_e``, ``[S, K]``. Grid: tiles, ⌈K / BN⌉; BN and BK divide 128, and BN is whole groups.

    ``MORE``: and ``a[r, N:] · M_e`` of a second matrix of the same shape. Else as `forward`.
    """
    e, start, stop = tile_of(ends_ptr, E, tl.program_id(0), BM, EXPERTS)
    if e >= E:
        return
    row = start + tl.arange(0, BM)
    live = row < stop
    slot = tl.load(order_ptr + row, mask=live, other=0)
    a_row = slot // TOP_K if BY_TOKEN else row
    k0 = tl.program_id(1) * BN
    a_rows = a_ptr + a_row.to(tl.int64)[:, None] * A_STRIDE
    w_at, s_at = e.to(tl.int64) * W_STRIDE, e.to(tl.int64) * S_STRIDE
    total = tl.zeros((BM, BN), tl.float32)
    total = summed(total, a_rows, live, w_ptr + w_at, s_ptr + s_at, table_ptr, k0, N, K, KIND, GROUP, BN, BK, STAGES)
    if MORE:
        total = summed(
            total, a_rows + N, live, more_w_ptr + w_at, more_s_ptr + s_at, table_ptr, k0, N, K, KIND, GROUP, BN, BK, STAGES
        )  # fmt: skip
    k = k0 + tl.arange(0, BN)
    out_row = slot if BY_SLOT else row
    out_at = out_ptr + out_row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & (k < K)[None, :])
