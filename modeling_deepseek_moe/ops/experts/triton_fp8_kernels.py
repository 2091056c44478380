"""What routed experts that train in FP8 need besides `triton_grouped`: Dgrad and Wgrad of codes, and the casts before them.

Tiles along a sum over rows are cut in each expert by itself: its rows begin with a tile, the last of which ends with zeros.
Codes are E4M3, or bytes on cards that do not multiply them, where they become bf16 as they are read.

Legend: S slots, R row among them in the experts' order, E experts, N outputs and K inputs of a product, I expert width, H halves:
matrices one above the other (gate and up) whose blocks and tiles begin with each.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes
from modeling_deepseek_moe.ops.experts.triton_kernels import tile_of


@triton.jit
def kept(x_ptr, scale_ptr, row, column, mask, WIDTH):
    """fp32 values of an activation ``[R, WIDTH]`` as it is, or of its codes (bytes) with a scale for 1 × 128 of a row."""
    at = row * WIDTH + column
    if x_ptr.dtype.element_ty == tl.uint8:
        scale = tl.load(scale_ptr + row * tl.cdiv(WIDTH, 128) + column // 128, mask=mask, other=0.0)
        x = codes.e4m3_bytes(tl.load(x_ptr + at, mask=mask, other=0)).to(tl.float32) * scale
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def dgrad(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, order_ptr, ends_ptr, out_ptr, E, N, K,
    TOP_K: tl.constexpr, HALVES: tl.constexpr, BY_TOKEN: tl.constexpr, BY_SLOT: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[r] = Σ_h a[r, h] · B_e[h]`` of ``a [R, H, K]`` and ``b [E, H, K, N]``. Grid: tiles, ⌈N / BN⌉; BK is 128.

    ``BY_TOKEN``: a has a row for each token; ``BY_SLOT``: out is in the slots' order.
    """
    e, start, stop = tile_of(ends_ptr, E, tl.program_id(0), BM, EXPERTS)
    if e >= E:
        return
    row = start + tl.arange(0, BM)
    live = row < stop
    slot = tl.load(order_ptr + row, mask=live, other=0)
    a_row = (slot // TOP_K if BY_TOKEN else row).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here, k = n < N, tl.arange(0, BK)
    steps = tl.cdiv(K, BK)
    a_at = a_ptr + a_row[:, None] * (HALVES * K) + k[None, :]
    b_at = b_ptr + e.to(tl.int64) * HALVES * K * N + k.to(tl.int64)[:, None] * N + n[None, :]
    a_scale_at = a_scale_ptr + a_row * (HALVES * steps)
    b_scale_at = b_scale_ptr + e.to(tl.int64) * HALVES * steps * tl.cdiv(N, 128) + n // 128
    total = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, HALVES * steps, num_stages=STAGES):
        k0 = (i % steps) * BK
        inside = k0 + k < K
        first = (i // steps) * K + k0
        a = tl.load(a_at + first, mask=live[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at + first * N, mask=inside[:, None] & here[None, :], other=0.0)
        if a_ptr.dtype.element_ty == tl.uint8:
            a, b = codes.e4m3_bytes(a), codes.e4m3_bytes(b)
        scale = tl.load(a_scale_at + i, mask=live, other=0.0)[:, None]
        scale *= tl.load(b_scale_at + i * tl.cdiv(N, 128), mask=here, other=0.0)[None, :]
        total += tl.dot(a, b) * scale
    out_row = (slot if BY_SLOT else row).to(tl.int64)
    out_at = out_ptr + out_row[:, None] * N + n[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & here[None, :])


@triton.jit
def wgrad(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, ends_ptr, out_ptr, E, N, K, WIDTH, EXPERTS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[e] = Σ_r a[:, r] · b[:, r]ᵀ`` over an expert's rows, ``[E, N, K]``; zeros without rows. BM is 128.

    ``a [N, WIDTH]`` and ``b [K, WIDTH]`` are as `cast_across` makes them. Grid: E, ⌈N / BN⌉ · ⌈K / BK⌉.
    """
    e = tl.program_id(0)
    tile, across = tl.program_id(1), tl.cdiv(K, BK)
    n = (tile // across) * BN + tl.arange(0, BN)
    k = (tile % across) * BK + tl.arange(0, BK)
    here, inside = n < N, k < K
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends_ptr + expert, mask=expert < E, other=0)
    begin = tl.load(ends_ptr + expert - 1, mask=(expert < E) & (expert > 0), other=0)
    tiles = tl.where(expert < E, (end - begin + BM - 1) // BM, 0)
    first = tl.sum(tl.where(expert < e, tiles, 0), 0)
    last = first + tl.sum(tl.where(expert == e, tiles, 0), 0)
    lane = tl.arange(0, BM)
    a_at = a_ptr + n.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    b_at = b_ptr + k.to(tl.int64)[None, :] * WIDTH + lane[:, None]
    total = tl.zeros((BN, BK), tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        a = tl.load(a_at + i * BM, mask=here[:, None], other=0.0)
        b = tl.load(b_at + i * BM, mask=inside[None, :], other=0.0)
        if a_ptr.dtype.element_ty == tl.uint8:
            a, b = codes.e4m3_bytes(a), codes.e4m3_bytes(b)
        scale = tl.load(a_scale_ptr + i * N + n, mask=here, other=0.0)[:, None]
        scale *= tl.load(b_scale_ptr + i * K + k, mask=inside, other=0.0)[None, :]
        total += tl.dot(a, b) * scale
    out_at = out_ptr + e.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def cast_across(
    x_ptr, x_scale_ptr, weights_ptr, order_ptr, ends_ptr, codes_ptr, scale_ptr, E, N, WIDTH,
    TOP_K: tl.constexpr, BY_TOKEN: tl.constexpr, WEIGHTED: tl.constexpr, SWIGLU: tl.constexpr, POWER: tl.constexpr,
    NATIVE: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Codes (bytes) ``[N, WIDTH]`` of ``x [R, N]``, turned, and fp32 scales ``[WIDTH / 128, N]`` of tiles of 128 rows of an expert.

    A tile's 128 places are its program's; those after its expert's last row are zeros. x is as `kept` reads it. ``BY_TOKEN``: it has
    a row for each token; ``WEIGHTED``: times the weight of its slot; ``SWIGLU``: of ``silu(x[:, :N]) · x[:, N:]``. BM is 128. Grid:
    tiles, ⌈N / BN⌉.
    """
    tile = tl.program_id(0)
    e, start, stop = tile_of(ends_ptr, E, tile, BM, EXPERTS)
    if e >= E:
        return
    lane = tl.arange(0, BM)
    row = start + lane
    live = row < stop
    slot = tl.load(order_ptr + row, mask=live, other=0)
    x_row = (slot // TOP_K if BY_TOKEN else row).to(tl.int64)[None, :]
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n < N)[:, None] & live[None, :]
    if SWIGLU:
        gate = kept(x_ptr, x_scale_ptr, x_row, n[:, None], mask, 2 * N)
        x = gate / (1 + tl.exp(-gate)) * kept(x_ptr, x_scale_ptr, x_row, N + n[:, None], mask, 2 * N)
    else:
        x = kept(x_ptr, x_scale_ptr, x_row, n[:, None], mask, N)
    if WEIGHTED:
        x *= tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[None, :]
    raw, scale = codes.encode_tiles(x, POWER, NATIVE)
    place = codes_ptr + n.to(tl.int64)[:, None] * WIDTH + (tile * BM + lane)[None, :]
    tl.store(place, raw, mask=(n < N)[:, None] & (lane < BM)[None, :])
    tl.store(scale_ptr + tile.to(tl.int64) * N + n, scale, mask=n < N)


@triton.jit
def swiglu_backward(
    inner_ptr, scale_ptr, weights_ptr, order_ptr, ends_ptr, d_h_ptr, d_inner_ptr, d_weights_ptr, E, I, BN: tl.constexpr  # noqa: E741
):  # fmt: skip
    """Of ``weight · silu(gate) · up`` from the gradient of its result. Grid: S.

    ``inner [S, 2I]`` is as `kept` reads it; gradients of it ``[S, 2I]``, and of the weights in the slots' order.
    """
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(ends_ptr + E - 1):
        return
    slot = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + slot).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for i0 in range(0, I, BN):
        i = i0 + tl.arange(0, BN)
        gate = kept(inner_ptr, scale_ptr, row, i, i < I, 2 * I)
        up = kept(inner_ptr, scale_ptr, row, I + i, i < I, 2 * I)
        d_h = tl.load(d_h_ptr + row * I + i, mask=i < I, other=0.0).to(tl.float32)
        part = 1 / (1 + tl.exp(-gate))
        silu = gate * part
        total += d_h * silu * up
        d_h *= weight
        out = d_inner_ptr + row * 2 * I + i
        tl.store(out, (d_h * up * (part + silu * (1 - part))).to(d_inner_ptr.dtype.element_ty), mask=i < I)
        tl.store(out + I, (d_h * silu).to(d_inner_ptr.dtype.element_ty), mask=i < I)
    tl.store(d_weights_ptr + slot, tl.sum(total, 0))


@triton.jit
def cast_blocks(w_ptr, codes_ptr, scale_ptr, N, K, NATIVE: tl.constexpr):
    """Codes (bytes) and fp32 scales of blocks of 128 × 128 of matrices ``[M, N, K]``, as `block_fp8.quantize` makes them.

    What is not finite gets the scale NaN. Grid: M, ⌈N / 128⌉, ⌈K / 128⌉.
    """
    matrix, block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    n, k = block * 128 + tl.arange(0, 128), tile * 128 + tl.arange(0, 128)
    mask = (n < N)[:, None] & (k < K)[None, :]
    at = matrix * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(w), 1), 0)
    lost = tl.sum(tl.sum(((w != w) | (tl.abs(w) == float("inf"))).to(tl.int32), 1), 0) > 0
    scale = tl.div_rn(tl.full((128,), 1.0, tl.float32) * largest, tl.full((128,), 448.0, tl.float32))
    scale = tl.where(lost, float("nan"), tl.where(scale == 0, 1.0, scale))
    v = tl.div_rn(w, tl.broadcast_to(scale[:, None], w.shape))
    v = tl.where(v > 448.0, 448.0, tl.where(v < -448.0, -448.0, v))
    raw = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if NATIVE else codes.encode8(v)
    tl.store(codes_ptr + at, raw, mask=mask)
    place = scale_ptr + (matrix * tl.cdiv(N, 128) + block) * tl.cdiv(K, 128) + tile + tl.arange(0, 128)
    tl.store(place, scale, mask=tl.arange(0, 128) == 0)
