"""Routed SwiGLU experts of four-bit codes for few rows, as Triton kernels: `triton_kernels` with groups of codes as factors.

Arguments, grids and results are those of `triton_kernels.gate_up` and `down`; ``table``, of codes that are looked up, is as
`_triton_groups.table_of` reads it. Legend: see there.
"""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton_groups as groups
from modeling_deepseek_moe.ops.experts.triton_kernels import rows_of


@triton.jit
def gate_up(
    x_ptr, indices_ptr, order_ptr, ends_ptr, w_ptr, s_ptr, table_ptr, h_ptr, E, I, D,  # noqa: E741
    TOP_K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr, EXPERTS: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``h[row] = silu(gate x) · up x`` in bf16, ``[S, I]``. Grid: tiles or slots, ⌈I / BN⌉."""
    e, row, slot, live = rows_of(indices_ptr, order_ptr, ends_ptr, E, BM, EXPERTS, SORTED)
    if e >= E:
        return
    G: tl.constexpr = BK // GROUP
    W: tl.constexpr = GROUP // 8
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here = n < I
    table = groups.table_of(table_ptr, KIND, W)
    g_ptr, gs_ptr = w_ptr + e.to(tl.int64) * 2 * I * (D // 8), s_ptr + e.to(tl.int64) * 2 * I * (D // GROUP)
    u_ptr, us_ptr = g_ptr + I.to(tl.int64) * (D // 8), gs_ptr + I.to(tl.int64) * (D // GROUP)
    k = tl.arange(0, BK)
    x_p = x_ptr + (slot // TOP_K)[None, :] * D + k[:, None]
    gate, up = tl.zeros((G, BN, BM), tl.float32), tl.zeros((G, BN, BM), tl.float32)
    for k0 in tl.range(0, D, BK, num_stages=STAGES):
        g = groups.words_of(g_ptr, n, here, k0, D, BK, WHOLE)
        u = groups.words_of(u_ptr, n, here, k0, D, BK, WHOLE)
        at, mask = groups.scale_places(n, here, k0, D, G, GROUP, WHOLE)
        gs = groups.plain_scales(gs_ptr, at, mask, KIND)
        us = groups.plain_scales(us_ptr, at, mask, KIND)
        x = tl.load(x_p + k0, mask=live[None, :] & (k0 + k < D)[:, None], other=0.0)
        x = groups.activations(x, KIND, G, W, BM)
        start = groups.offset(x, KIND, BN)
        gate += groups.scaled(tl.dot(groups.values(g, table, KIND, G, BN, W), x, start), gs)
        up += groups.scaled(tl.dot(groups.values(u, table, KIND, G, BN, W), x, start), us)
    gate, up = tl.sum(gate, 0), tl.sum(up, 0)
    h = gate / (1 + tl.exp(-gate)) * up
    tl.store(h_ptr + row[None, :] * I + n[:, None], h.to(tl.bfloat16), mask=live[None, :] & here[:, None])


@triton.jit
def down(
    h_ptr, indices_ptr, order_ptr, ends_ptr, weights_ptr, w_ptr, s_ptr, table_ptr, y_ptr, E, I, D,  # noqa: E741
    KIND: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr, EXPERTS: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``y[slot] = weight · down h[row]`` in fp32, ``[S, D]``, of the slots that are served here. Grid as `gate_up`, ⌈D / BN⌉."""
    e, row, slot, live = rows_of(indices_ptr, order_ptr, ends_ptr, E, BM, EXPERTS, SORTED)
    if e >= E:
        return
    G: tl.constexpr = BK // GROUP
    W: tl.constexpr = GROUP // 8
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here = n < D
    table = groups.table_of(table_ptr, KIND, W)
    w_ptr, s_ptr = w_ptr + e.to(tl.int64) * D * (I // 8), s_ptr + e.to(tl.int64) * D * (I // GROUP)
    k = tl.arange(0, BK)
    h_p = h_ptr + row[None, :] * I + k[:, None]
    y = tl.zeros((G, BN, BM), tl.float32)
    for k0 in tl.range(0, I, BK, num_stages=STAGES):
        w = groups.words_of(w_ptr, n, here, k0, I, BK, WHOLE)
        at, mask = groups.scale_places(n, here, k0, I, G, GROUP, WHOLE)
        scales = groups.plain_scales(s_ptr, at, mask, KIND)
        h = tl.load(h_p + k0, mask=live[None, :] & (k0 + k < I)[:, None], other=0.0)
        h = groups.activations(h, KIND, G, W, BM)
        start = groups.offset(h, KIND, BN)
        y += groups.scaled(tl.dot(groups.values(w, table, KIND, G, BN, W), h, start), scales)
    weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)
    out = tl.sum(y, 0) * weight[None, :]
    tl.store(y_ptr + slot[None, :] * D + n[:, None], out, mask=live[None, :] & here[:, None])
