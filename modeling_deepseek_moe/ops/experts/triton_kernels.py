"""Routed SwiGLU experts as Triton kernels: gate and up with SwiGLU, down with the routing weights, and a token's sum.

Weights are the left factor and come as stored: E4M3 with a scale for 128 × 128, INT4, NF4, FP4 and MXFP4 with one for a
group of a row, or bf16; codes are read as int32 words of four or eight. Activations are bf16, sums fp32. A step of the sum
takes its values in parts, as a register holds them (`_triton_codes`): the activations are read in that order.

``SORTED``: a program has up to BM rows of one expert, in the experts' order that `plan` made; else one slot, and seven
columns of the tensor cores' eight are idle: with few tokens the weights' way from memory is what takes time.

Shared experts of the same format join in as more slots, one for each token.

Legend: T tokens, K experts per token, S = T·K slots, E experts, D hidden size, I expert width. An index of E or more marks
a slot that is served elsewhere.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_codes as codes


@triton.jit
def plan(indices_ptr, order_ptr, ends_ptr, S, BLOCK: tl.constexpr):
    """Slots in the experts' order, stable, and where each expert's end; a program an expert, none waits for another."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, BLOCK):
        index = tl.load(indices_ptr + start + lane, mask=start + lane < S, other=expert)
        before += (index < expert).to(tl.int32)
    place = tl.sum(before, 0)
    for start in range(0, S, BLOCK):
        slot = start + lane
        own = (tl.load(indices_ptr + slot, mask=slot < S, other=-1) == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(own, 0) - 1, slot, mask=own > 0)
        place += tl.sum(own, 0)
    tl.store(ends_ptr + expert, place)


@triton.jit
def tile_of(ends_ptr, E, pid, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert, first row and end of rows of the pid-th tile of at most BM rows of one expert; an expert of E: none is left."""
    expert = tl.arange(0, EXPERTS)
    here = expert < E
    end = tl.load(ends_ptr + expert, mask=here, other=0)
    begin = tl.load(ends_ptr + expert - 1, mask=here & (expert > 0), other=0)
    tiles = tl.where(here, (end - begin + BM - 1) // BM, 0)
    upto = tl.cumsum(tiles, 0)
    e = tl.sum((upto <= pid).to(tl.int32), 0)
    own = expert == e
    first = tl.sum(tl.where(own, upto - tiles, 0), 0)
    start = tl.sum(tl.where(own, begin, 0), 0) + (pid - first) * BM
    return tl.minimum(e, E), start, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def rows_of(indices_ptr, order_ptr, ends_ptr, E, BM: tl.constexpr, EXPERTS: tl.constexpr, SORTED: tl.constexpr):
    """Of this program: the expert (E: nothing to do), its rows among the intermediate results, their slots, which there are."""
    pid, lane = tl.program_id(0), tl.arange(0, BM)
    if SORTED:
        e, start, stop = tile_of(ends_ptr, E, pid, BM, EXPERTS)
        row = start + lane
        live = (row < stop) & (e < E)
        slot = tl.load(order_ptr + row, mask=live, other=0)
    else:
        e = tl.minimum(tl.load(indices_ptr + pid), E).to(tl.int32)
        row = pid + 0 * lane
        live = lane == 0
        slot = row
    return e, row.to(tl.int64), slot.to(tl.int64), live


@triton.jit
def column(m, PART: tl.constexpr, KIND: tl.constexpr):
    """Which input features the m-th values of a part belong to."""
    if KIND == "bf16":
        k = m
    elif KIND == "fp8":
        k = 2 * m + PART
    elif KIND == "nf4":
        k = 8 * (m // 2) + 2 * PART + m % 2
    else:
        k = 8 * (m // 2) + PART + 4 * (m % 2)
    return k


@triton.jit
def values(words, scales, table_ptr, PART: tl.constexpr, KIND: tl.constexpr):
    """A part of a step's weights in bf16; with the scales of groups, where a format has groups."""
    if KIND == "bf16":
        out = words
    elif KIND == "fp8":
        out = codes.e4m3(words, PART)
    elif KIND == "int4":
        out = codes.int4(words, PART) * scales
    elif KIND == "mxfp4":
        out = codes.e2m1(words, PART) * scales
    else:
        out = codes.by_table(words, table_ptr, PART) * scales
    return out


@triton.jit
def stored(w_ptr, row, live, k0, width, STEP: tl.constexpr, KIND: tl.constexpr):
    """A step's weights as they lie: ``STEP`` elements of a row of ``width`` (bf16 values, or words), from element k0."""
    k = k0 + tl.arange(0, STEP)
    mask = live[:, None] & (k < width)[None, :]
    tile = tl.load(w_ptr + row[:, None] * width + k[None, :], mask=mask, other=0)
    if KIND == "bf16":
        out = tile
    else:
        out = tile.to(tl.uint32, bitcast=True)
    return out


@triton.jit
def step_scales(
    s_ptr, row, live, k0, K, BK: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr
):
    """The scales of a part's values ``[N, BK / PARTS]``, for a format with groups; of the block of 128 × 128 of FP8."""
    GROUPS: tl.constexpr = BK // GROUP
    STEP: tl.constexpr = BK // PARTS
    if KIND == "bf16":
        out = 1.0
    elif KIND == "fp8":
        out = tl.load(s_ptr + k0 // 128)
    else:
        group = k0 // GROUP + tl.arange(0, GROUPS)
        mask = live[:, None] & (group < K // GROUP)[None, :]
        scale = tl.load(s_ptr + row[:, None] * (K // GROUP) + group[None, :], mask=mask, other=0)
        if KIND == "mxfp4":  # exponents: of 2^-127 too, which is subnormal
            scale = tl.maximum(scale.to(tl.uint16) << 7, 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        each = tl.broadcast_to(scale.to(tl.bfloat16)[:, :, None], (row.shape[0], GROUPS, STEP // GROUPS))
        out = tl.reshape(each, (row.shape[0], STEP))
    return out


@triton.jit
def swiglu(
    x_row, g_ptr, u_ptr, gs_ptr, us_ptr, table_ptr, n, here, live, D,
    KIND: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``silu(gate x) · up x`` in fp32, ``[BN, BM]``, of rows ``n`` of two matrices; the scales of FP8 begin with their blocks'."""
    PER: tl.constexpr = 1 if KIND == "bf16" else (4 if KIND == "fp8" else 8)  # values of an element
    PARTS: tl.constexpr = 1 if KIND == "bf16" else (2 if KIND == "fp8" else 4)
    PART_STEP: tl.constexpr = BK // PARTS
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(0, D, BK, num_stages=STAGES):
        g = stored(g_ptr, n, here, k0 // PER, D // PER, BK // PER, KIND)
        u = stored(u_ptr, n, here, k0 // PER, D // PER, BK // PER, KIND)
        gs = step_scales(gs_ptr, n, here, k0, D, BK, PARTS, KIND, GROUP)
        us = step_scales(us_ptr, n, here, k0, D, BK, PARTS, KIND, GROUP)
        g_sum = tl.zeros((BN, BM), tl.float32)
        u_sum = tl.zeros((BN, BM), tl.float32)
        for part in tl.static_range(PARTS):
            k = k0 + column(tl.arange(0, PART_STEP), part, KIND)
            x = tl.load(x_row + k[:, None], mask=live[None, :] & (k < D)[:, None], other=0.0)
            g_sum = tl.dot(values(g, gs, table_ptr, part, KIND), x, g_sum)
            u_sum = tl.dot(values(u, us, table_ptr, part, KIND), x, u_sum)
        if KIND == "fp8":
            gate += g_sum * gs
            up += u_sum * us
        else:
            gate += g_sum
            up += u_sum
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def product(
    x_row, w_ptr, s_ptr, table_ptr, n, here, live, K,
    KIND: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``W x`` in fp32, ``[BN, BM]``, of rows ``n`` of a matrix; as `swiglu`."""
    PER: tl.constexpr = 1 if KIND == "bf16" else (4 if KIND == "fp8" else 8)
    PARTS: tl.constexpr = 1 if KIND == "bf16" else (2 if KIND == "fp8" else 4)
    PART_STEP: tl.constexpr = BK // PARTS
    y = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        w = stored(w_ptr, n, here, k0 // PER, K // PER, BK // PER, KIND)
        scales = step_scales(s_ptr, n, here, k0, K, BK, PARTS, KIND, GROUP)
        y_sum = tl.zeros((BN, BM), tl.float32)
        for part in tl.static_range(PARTS):
            k = k0 + column(tl.arange(0, PART_STEP), part, KIND)
            x = tl.load(x_row + k[:, None], mask=live[None, :] & (k < K)[:, None], other=0.0)
            y_sum = tl.dot(values(w, scales, table_ptr, part, KIND), x, y_sum)
        if KIND == "fp8":
            y += y_sum * scales
        else:
            y += y_sum
    return y


@triton.jit
def gate_up(
    x_ptr, indices_ptr, order_ptr, ends_ptr, w_ptr, s_ptr, table_ptr, h_ptr, E, I, D,  # noqa: E741
    gate_ptr, up_ptr, gate_s_ptr, up_s_ptr, shared_ptr, S, WIDTH,
    TOP_K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``h[row] = silu(gate x) · up x`` in bf16, ``[S, I]``. Grid: tiles or slots, ⌈I / BN⌉; BN divides 128.

    With SHARED the programs after the S slots are one for each token, of the shared experts: ``shared [T, WIDTH]``. The grid is
    as wide as the wider of both.
    """
    PER: tl.constexpr = 1 if KIND == "bf16" else (4 if KIND == "fp8" else 8)
    SCALED: tl.constexpr = KIND != "bf16" and KIND != "fp8"
    n0 = tl.program_id(1) * BN
    n = n0 + tl.arange(0, BN)
    block = (n0 // 128) * tl.cdiv(D, 128) if KIND == "fp8" else 0
    if SHARED and tl.program_id(0) >= S:
        token = (tl.program_id(0) - S).to(tl.int64)
        live = tl.arange(0, BM) == 0
        x_row = x_ptr + (token + 0 * tl.arange(0, BM))[None, :] * D
        own_gs, own_us = gate_s_ptr, up_s_ptr
        if KIND == "fp8":
            own_gs, own_us = gate_s_ptr + block, up_s_ptr + block
        h = swiglu(
            x_row, gate_ptr, up_ptr, own_gs, own_us, table_ptr, n, n < WIDTH, live, D, KIND, GROUP, BM, BN, BK, STAGES
        )  # fmt: skip
        h_p = shared_ptr + token * WIDTH + n[:, None] + 0 * tl.arange(0, BM)[None, :]
        tl.store(h_p, h.to(tl.bfloat16), mask=live[None, :] & (n < WIDTH)[:, None])
    else:
        e, row, slot, live = rows_of(indices_ptr, order_ptr, ends_ptr, E, BM, EXPERTS, SORTED)
        if (e < E) & (n0 < I):
            matrix = e.to(tl.int64) * 2 * I
            g_ptr = w_ptr + matrix * (D // PER)
            u_ptr = g_ptr + I.to(tl.int64) * (D // PER)
            gs_ptr, us_ptr = s_ptr, s_ptr
            if KIND == "fp8":  # gate and up have blocks of their own
                gs_ptr = s_ptr + e.to(tl.int64) * 2 * tl.cdiv(I, 128) * tl.cdiv(D, 128) + block
                us_ptr = gs_ptr + tl.cdiv(I, 128) * tl.cdiv(D, 128)
            if SCALED:
                gs_ptr = s_ptr + matrix * (D // GROUP)
                us_ptr = gs_ptr + I.to(tl.int64) * (D // GROUP)
            x_row = x_ptr + (slot // TOP_K)[None, :] * D
            h = swiglu(
                x_row, g_ptr, u_ptr, gs_ptr, us_ptr, table_ptr, n, n < I, live, D, KIND, GROUP, BM, BN, BK, STAGES
            )  # fmt: skip
            tl.store(h_ptr + row[None, :] * I + n[:, None], h.to(tl.bfloat16), mask=live[None, :] & (n < I)[:, None])


@triton.jit
def down(
    h_ptr, indices_ptr, order_ptr, ends_ptr, weights_ptr, w_ptr, s_ptr, table_ptr, y_ptr, E, I, D,  # noqa: E741
    down_ptr, down_s_ptr, shared_ptr, S, WIDTH,
    KIND: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``y[slot] = weight · down h[row]`` in fp32, ``[S, D]``, of the slots that are served here. Grid as `gate_up`, ⌈D / BN⌉.

    With SHARED ``y [S + T, D]`` ends with what the shared experts give each token.
    """
    PER: tl.constexpr = 1 if KIND == "bf16" else (4 if KIND == "fp8" else 8)
    SCALED: tl.constexpr = KIND != "bf16" and KIND != "fp8"
    n0 = tl.program_id(1) * BN
    n = n0 + tl.arange(0, BN)
    here = n < D
    if SHARED and tl.program_id(0) >= S:
        token = (tl.program_id(0) - S).to(tl.int64)
        live = tl.arange(0, BM) == 0
        own_s = down_s_ptr
        if KIND == "fp8":
            own_s = down_s_ptr + (n0 // 128) * tl.cdiv(WIDTH, 128)
        h_row = shared_ptr + (token + 0 * tl.arange(0, BM))[None, :] * WIDTH
        y = product(h_row, down_ptr, own_s, table_ptr, n, here, live, WIDTH, KIND, GROUP, BM, BN, BK, STAGES)
        y_p = y_ptr + (S + token) * D + n[:, None] + 0 * tl.arange(0, BM)[None, :]
        tl.store(y_p, y, mask=live[None, :] & here[:, None])
    else:
        e, row, slot, live = rows_of(indices_ptr, order_ptr, ends_ptr, E, BM, EXPERTS, SORTED)
        if e < E:
            matrix = e.to(tl.int64) * D
            own_s = s_ptr
            if KIND == "fp8":
                own_s = s_ptr + (e.to(tl.int64) * tl.cdiv(D, 128) + n0 // 128) * tl.cdiv(I, 128)
            if SCALED:
                own_s = s_ptr + matrix * (I // GROUP)
            w_rows, h_row = w_ptr + matrix * (I // PER), h_ptr + row[None, :] * I
            y = product(h_row, w_rows, own_s, table_ptr, n, here, live, I, KIND, GROUP, BM, BN, BK, STAGES)
            weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)
            tl.store(y_ptr + slot[None, :] * D + n[:, None], y * weight[None, :], mask=live[None, :] & here[:, None])


@triton.jit
def combine(y_ptr, indices_ptr, out_ptr, E, D, TOP_K: tl.constexpr, BN: tl.constexpr):
    """``out[t]``: the sum over the token's slots that were served here, in their order, in fp32. Grid: T, ⌈D / BN⌉."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        served = tl.load(indices_ptr + slot) < E
        total += tl.load(y_ptr + slot * D + n, mask=(n < D) & served, other=0.0)
    tl.store(out_ptr + token * D + n, total.to(out_ptr.dtype.element_ty), mask=n < D)
