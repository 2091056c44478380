"""Triton kernels of a router: its logits and its choice.

Legend: T tokens, E experts, G groups, K experts per token, D hidden size.
"""

import triton
import triton.language as tl


@triton.jit
def logits(x_ptr, w_ptr, out_ptr, E, D, BE: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr):
    """out [T, E] = x Wᵀ, products and sums in fp32. grid (ceil(E/BE), T)."""
    e, t = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(1)
    d = tl.arange(0, BD)
    x_p, w_p = x_ptr + t.to(tl.int64) * D + d, w_ptr + e[:, None].to(tl.int64) * D + d[None, :]
    acc = tl.zeros((BE, BD), tl.float32)
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        w = tl.load(w_p + d0, mask=(e < E)[:, None] & (d0 + d < D)[None, :], other=0.0).to(tl.float32)
        acc += w * tl.load(x_p + d0, mask=d0 + d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + t * E + e, tl.sum(acc, 1), mask=e < E)


@triton.jit
def route(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, E, factor, G: tl.constexpr, EG: tl.constexpr, GP: tl.constexpr, EGP: tl.constexpr,
    TOPG: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SOFTMAX: tl.constexpr, TOP2: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """weights [T, K] fp32 and indices [T, K] int64, the best first, of equals the lowest index. grid (T,).

    E = G · EG experts lie as [GP, EGP], padded to powers of two. A score that is NaN is chosen last.
    """
    t = tl.program_id(0)
    g, i = tl.arange(0, GP), tl.arange(0, EGP)
    real = (g < G)[:, None] & (i < EG)[None, :]
    e = g[:, None] * EG + i[None, :]
    x = tl.load(logits_ptr + t.to(tl.int64) * E + e, mask=real, other=float("-inf"))
    if SOFTMAX:
        x = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = tl.div_rn(x, tl.broadcast_to(tl.sum(tl.sum(x, 1), 0), (GP, EGP)))
    else:
        scores = tl.div_rn(tl.full((GP, EGP), 1.0, tl.float32), 1 + tl.exp(-x))
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + e, mask=real, other=0.0)
    choice = tl.where(real & (choice == choice), choice, float("-inf"))
    if G > 1:
        best = tl.max(choice, 1)
        if TOP2:
            at = tl.argmax(choice, 1, tie_break_left=True)
            best += tl.max(tl.where(i[None, :] == at[:, None], float("-inf"), choice), 1)
        best = tl.where(g < G, best, float("-inf"))
        kept = g < 0
        for _ in tl.static_range(TOPG):
            at = tl.argmax(tl.where(kept, float("-inf"), best), 0, tie_break_left=True)
            kept = kept | (g == at)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    k = tl.arange(0, KP)
    indices, weights = tl.zeros((KP,), tl.int32), tl.zeros((KP,), tl.float32)
    choice, scores, e = tl.reshape(choice, (GP * EGP,)), tl.reshape(scores, (GP * EGP,)), tl.reshape(e, (GP * EGP,))
    free = tl.reshape(real, (GP * EGP,))
    for j in tl.static_range(K):
        top = tl.max(tl.where(free, choice, float("-inf")), 0)
        at = tl.min(tl.where(free & (choice == top), e, 2147483647), 0)
        free = free & (e != at)
        indices = tl.where(k == j, at, indices)
        weights = tl.where(k == j, tl.sum(tl.where(e == at, scores, 0.0), 0), weights)
    if NORM:
        weights = tl.div_rn(weights, tl.broadcast_to(tl.sum(weights, 0) + 1e-20, (KP,)))
    tl.store(weights_ptr + t * K + k, weights * factor, mask=k < K)
    tl.store(indices_ptr + t * K + k, indices.to(tl.int64), mask=k < K)
