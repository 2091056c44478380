"""Products of rows sorted by expert, as Triton kernels: Fprop and Dgrad, Wgrad, and SwiGLU with its gradient.

Rows lie in the experts' order that `triton_kernels.plan` made; where a factor has a row for each token, a kernel gathers
it, and where a result is a slot's, it is scattered, so nothing is permuted for its own sake. Factors are bf16, or E4M3
codes with a scale for 1 × 128 of a row and 128 × 128 of a weight, whose sums of 128 products are promoted to fp32; bytes
where a card does not multiply codes, which become bf16.

Legend: S slots, R row among them, E experts, N outputs, K inputs of a product, I expert width.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes
from modeling_deepseek_moe.ops.experts.triton_kernels import tile_of


@triton.jit
def product(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, order_ptr, ends_ptr, weights_ptr, out_ptr, E, N, K, HALF,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BY_TOKEN: tl.constexpr, BY_SLOT: tl.constexpr, TURNED: tl.constexpr, FP8: tl.constexpr,
    ADD: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[r] = a[r] · B_e``: of ``b [E, N, K]``, ``TURNED``: ``[E, K, N]``. Grid: tiles, ⌈N / BN⌉.

    ``WEIGHTED``: times the weight of its slot. ``BY_TOKEN``: a has a row for each token; ``BY_SLOT``: out is in the slots' order. ``HALF``: rows from there on have
    blocks of scales of their own, as up's after gate's. With ``FP8`` BK is 128. ``ADD``: onto what out holds.
    """
    e, start, stop = tile_of(ends_ptr, E, tl.program_id(0), BM, EXPERTS)
    if e >= E:
        return
    row = start + tl.arange(0, BM)
    live = row < stop
    slot = tl.load(order_ptr + row, mask=live, other=0)
    a_row = slot // TOP_K if BY_TOKEN else row
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here = n < N
    k = tl.arange(0, BK)
    a_at = a_ptr + a_row.to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + e.to(tl.int64) * N * K
    if TURNED:
        b_at += k.to(tl.int64)[:, None] * N + n[None, :]
        b_step = N
    else:
        b_at += n.to(tl.int64)[None, :] * K + k[:, None]
        b_step = 1
    if FP8:
        blocks = tl.where(n < HALF, n // 128, tl.cdiv(HALF, 128) + (n - HALF) // 128)
        each = tl.cdiv(HALF, 128) + tl.cdiv(N - HALF, 128)
        b_scale_at = b_scale_ptr + (e.to(tl.int64) * each + blocks) * tl.cdiv(K, 128)
        a_scale_at = a_scale_ptr + a_row.to(tl.int64) * tl.cdiv(K, 128)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        inside = k0 + k < K
        a = tl.load(a_at + k0, mask=live[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at + k0 * b_step, mask=inside[:, None] & here[None, :], other=0.0)
        if a_ptr.dtype.element_ty == tl.uint8:
            a, b = codes.e4m3_bytes(a), codes.e4m3_bytes(b)
        if FP8:
            scale = tl.load(a_scale_at + k0 // 128, mask=live, other=0.0)[:, None]
            scale *= tl.load(b_scale_at + k0 // 128, mask=here, other=0.0)[None, :]
            total += tl.dot(a, b) * scale
        else:
            total = tl.dot(a, b, total)
    if WEIGHTED:
        total *= tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    out_row = slot if BY_SLOT else row
    out_at = out_ptr + out_row.to(tl.int64)[:, None] * N + n[None, :]
    if ADD:
        total += tl.load(out_at, mask=live[:, None] & here[None, :], other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & here[None, :])


@triton.jit
def outer(
    a_ptr, b_ptr, order_ptr, ends_ptr, out_ptr, N, K,
    TOP_K: tl.constexpr, A_BY_TOKEN: tl.constexpr, B_BY_TOKEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[e] = Σ_r a[r]ᵀ · b[r]`` over an expert's rows, ``[E, N, K]``; zeros without rows. Grid: E, ⌈N / BN⌉ · ⌈K / BK⌉."""
    e = tl.program_id(0)
    tile, across = tl.program_id(1), tl.cdiv(K, BK)
    n = (tile // across) * BN + tl.arange(0, BN)
    k = (tile % across) * BK + tl.arange(0, BK)
    here, inside = n < N, k < K
    begin = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_ptr + e)
    lane = tl.arange(0, BM)
    total = tl.zeros((BN, BK), tl.float32)
    for r in tl.range(begin, end, BM, num_stages=STAGES):
        row = r + lane
        live = row < end
        token = tl.load(order_ptr + row, mask=live, other=0) // TOP_K
        a_row = token if A_BY_TOKEN else row
        b_row = token if B_BY_TOKEN else row
        a = tl.load(
            a_ptr + a_row.to(tl.int64)[None, :] * N + n[:, None], mask=here[:, None] & live[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + b_row.to(tl.int64)[:, None] * K + k[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(a, b, total)
    out_at = out_ptr + e.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def swiglu(inner_ptr, weights_ptr, order_ptr, ends_ptr, out_ptr, E, I, BN: tl.constexpr):  # noqa: E741
    """``weight · silu(gate) · up`` of rows ``[S, 2I]``, ``[S, I]``. Grid: S, ⌈I / BN⌉."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(ends_ptr + E - 1):
        return
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    gate = tl.load(inner_ptr + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(inner_ptr + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + tl.load(order_ptr + row)).to(tl.float32)
    h = gate / (1 + tl.exp(-gate)) * up * weight
    tl.store(out_ptr + row * I + i, h.to(out_ptr.dtype.element_ty), mask=i < I)


@triton.jit
def swiglu_backward(
    inner_ptr, weights_ptr, order_ptr, ends_ptr, d_h_ptr, d_inner_ptr, d_weights_ptr, E, I, BN: tl.constexpr  # noqa: E741
):  # fmt: skip
    """Of `swiglu`, from the gradient of its result: of its rows, and of the weights, in the slots' order. Grid: S."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(ends_ptr + E - 1):
        return
    slot = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + slot).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for i0 in range(0, I, BN):
        i = i0 + tl.arange(0, BN)
        gate = tl.load(inner_ptr + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
        up = tl.load(inner_ptr + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
        d_h = tl.load(d_h_ptr + row * I + i, mask=i < I, other=0.0).to(tl.float32)
        part = 1 / (1 + tl.exp(-gate))
        silu = gate * part
        total += d_h * silu * up
        d_gate = d_h * weight * up * (part + silu * (1 - part))
        d_up = d_h * weight * silu
        tl.store(d_inner_ptr + row * 2 * I + i, d_gate.to(d_inner_ptr.dtype.element_ty), mask=i < I)
        tl.store(d_inner_ptr + row * 2 * I + I + i, d_up.to(d_inner_ptr.dtype.element_ty), mask=i < I)
    tl.store(d_weights_ptr + slot, tl.sum(total, 0))


@triton.jit
def quantize(x_ptr, ends_ptr, codes_ptr, scale_ptr, E, K, SWIGLU: tl.constexpr, BN: tl.constexpr):
    """``[R, K]`` → E4M3 codes and fp32 scales of tiles of 1 × 128, as `block_fp8.quantize_tiles`. Grid: R, ⌈K / BN⌉; BN is 128 · n.

    ``SWIGLU``: of ``silu(x[:, :K]) · x[:, K:]``, for rows that an expert here has.
    """
    row = tl.program_id(0).to(tl.int64)
    if SWIGLU:  # noqa: SIM102 - known as the kernel is compiled
        if row >= tl.load(ends_ptr + E - 1):
            return
    TILES: tl.constexpr = BN // 128
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    k = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    if SWIGLU:
        gate = tl.load(x_ptr + row * 2 * K + k, mask=k < K, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * 2 * K + K + k, mask=k < K, other=0.0).to(tl.float32)
        x = gate / (1 + tl.exp(-gate)) * up
    else:
        x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 1) / 448.0
    lost = tl.sum((x != x).to(tl.int32), 1) > 0  # NaN stays: a result that is lost must be seen to be
    scale = tl.where(lost, float("nan"), tl.where(scale == 0, 1.0, scale))
    tl.store(codes_ptr + row * K + k, (x / scale[:, None]).to(tl.float8e4nv), mask=k < K)
    tl.store(scale_ptr + row * tl.cdiv(K, 128) + tile, scale, mask=tile < tl.cdiv(K, 128))
