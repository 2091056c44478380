"""The Triton kernel that attends to latents in pages; `triton_kernels` has what comes before and after it, and the legend."""

import triton
import triton.language as tl

from modeling_deepseek_moe.ops.absorbed_attention import triton_kernels as kernels


@triton.jit
def places(first, second, column, HALF: tl.constexpr):
    """Where columns of rows lie, ``[BN, columns]``: the first HALF after ``first [BN]``, the others after ``second``."""
    in_first = first[:, None] + column[None, :]
    return tl.where((column < HALF)[None, :], in_first, second[:, None] + (column - HALF)[None, :])


@triton.jit
def split_pages(
    q_ptr, pe_ptr, first_ptr, second_ptr, index_ptr, starts_ptr, o_ptr, lse_ptr, scale_log2, H, sp_b, sp_h, sf_t, ss_t,
    R: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `triton_kernels.split`, of row b's keys ``index[t]``, ``starts[b] <= t < starts[b + 1]``. grid (ceil(H/BH), S, B).

    A key is a row [c_kv; k_pe], whose first HALF columns lie in ``first``, the others in ``second``.
    """
    b = tl.program_id(2)
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    hm = h < H
    r, p = tl.arange(0, RP), tl.arange(0, PP)
    rm, pm = r < R, p < P
    lo, hi = kernels.part(tl.load(starts_ptr + b), tl.load(starts_ptr + b + 1), BN)
    row = (b * tl.num_programs(1) + tl.program_id(1)) * H + h
    if lo >= hi:
        tl.store(lse_ptr + row, tl.full((BH,), float("-inf"), tl.float32), mask=hm)
        return
    q = tl.load(q_ptr + (b * H + h[:, None]) * R + r[None, :], mask=hm[:, None] & rm[None, :], other=0.0)
    q_pe = tl.load(pe_ptr + b * sp_b + h[:, None] * sp_h + p[None, :], mask=hm[:, None] & pm[None, :], other=0.0)
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, RP), tl.float32)
    for t0 in tl.range(lo, hi, BN, num_stages=STAGES):
        t = t0 + tl.arange(0, BN)
        tm = t < hi
        at = tl.load(index_ptr + t, mask=tm, other=0)
        first, second = first_ptr + at * sf_t, second_ptr + at * ss_t
        c = tl.load(places(first, second, r, HALF), mask=tm[:, None] & rm[None, :], other=0.0)
        k = tl.load(places(first, second, R + p, HALF), mask=tm[:, None] & pm[None, :], other=0.0)
        s = tl.dot(q, tl.trans(c), input_precision="ieee")
        s = tl.dot(q_pe, tl.trans(k), s, input_precision="ieee") * scale_log2
        s = tl.where(tm[None, :], s, float("-inf"))
        top, total, acc = kernels.weighed(s, c, top, total, acc)
    kernels.keep(o_ptr, lse_ptr, row, r, hm, top, total, acc, R)
