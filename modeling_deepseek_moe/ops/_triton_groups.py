"""Four-bit codes for products of few rows: whole groups as one factor of a batched product, their scales on its sums.

Imported by kernels only: it needs Triton. A step of ``G`` groups of ``8·W`` input features is G products, one for each group
(and each warp takes other groups), so that a scale multiplies a sum of a group in fp32 and not each of its codes. Codes become
bf16 in registers, in the order in which tensor cores want them: the words of a group, of which each lane of four has its own,
give the features ``(i, word, j, half)``, and `activations` brings x into that order, which costs nothing.

Two instructions of the cards are named here, since the compiler finds neither: ``lop3``, and ``prmt``, which looks four codes
up in a table of eight bytes.

Legend: N output features of a program, M rows of x, W words of a group.
"""

import triton
import triton.language as tl


@triton.jit
def merged(words, mask, bits):
    """``(words & mask) | bits`` in one instruction."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, mask, bits], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def picked(low, high, selector):
    """Four bytes of the eight of ``high:low``, by the lowest four nibbles of ``selector``, each 0 to 7."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def table_of(table_ptr, KIND: tl.constexpr, W: tl.constexpr):
    """The words of a table of sixteen bf16, ``[1, 1, W]`` each: four of the low bytes, then four of the high ones.

    They are loaded, though they are constants, and from eight places each, which hold the same: ptxas would make constants
    again for each instruction, and copy what is the same in all lanes.
    """
    if KIND == "int4":
        out = ()
    else:
        one = table_ptr + tl.arange(0, W)[None, None, :]
        a, b, c, d = tl.load(one), tl.load(one + 8), tl.load(one + 16), tl.load(one + 24)
        e, f, g, h = tl.load(one + 32), tl.load(one + 40), tl.load(one + 48), tl.load(one + 56)
        out = (a, b, c, d, e, f, g, h)
    return out


@triton.jit
def looked_up(index, upper, a, b, c, d, SIGNED: tl.constexpr):
    """Four bytes of a table of sixteen: ``a`` and ``b`` are those of codes 0 to 7, the lowest first, ``c`` and ``d`` the others.

    ``index``: the codes' lowest three bits. ``upper``: of which half each code is. ``SIGNED``: both halves are the same.
    """
    low = picked(tl.broadcast_to(a, index.shape), tl.broadcast_to(b, index.shape), index)
    if not SIGNED:
        high = picked(tl.broadcast_to(c, index.shape), tl.broadcast_to(d, index.shape), index)
        low = picked(low, high, upper)
    return low


@triton.jit
def two_pairs(index, upper, table, KIND: tl.constexpr):
    """What the lowest four codes of each word stand for, as two pairs of bf16."""
    a, b, c, d, e, f, g, h = table
    low = looked_up(index, upper, a, b, c, d, KIND != "nf4")  # a sign is in the high byte
    high = looked_up(index, upper, e, f, g, h, False)
    if KIND == "mxfp4":  # the lowest code is the earliest column; else the second
        one, two = picked(low, high, 0x5140), picked(low, high, 0x7362)
    else:
        one, two = picked(low, high, 0x4051), picked(low, high, 0x6273)
    return one, two


@triton.jit
def pairs(w, table, KIND: tl.constexpr):
    """The four pairs of bf16 of each word, as uint32: codes p and p + 4 of int4, columns 2p and 2p + 1 of the others."""
    if KIND == "int4":  # 128 + code: `offset` takes the rest
        low = tl.full(w.shape, 0x000F000F, tl.uint32)
        bits = tl.full(w.shape, 0x43004300, tl.uint32)
        p0, p1 = merged(w, low, bits), merged(w >> 4, low, bits)
        p2, p3 = merged(w >> 8, low, bits), merged(w >> 12, low, bits)
    else:
        index = w & 0x77777777
        upper = merged(w >> 1, tl.full(w.shape, 0x44444444, tl.uint32), tl.full(w.shape, 0x32103210, tl.uint32))
        p0, p1 = two_pairs(index, upper, table, KIND)
        p2, p3 = two_pairs(index >> 16, upper >> 16, table, KIND)
    return p0, p1, p2, p3


@triton.jit
def values(words, table, KIND: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """uint32 ``[N, G·W]`` → bf16 ``[G, N, 8·W]``: codes without their scales; those of int4 and 136 more."""
    p0, p1, p2, p3 = pairs(tl.permute(tl.reshape(words, (N, G, W)), (1, 0, 2)), table, KIND)
    both = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [G, N, W, i, j] of pairs 2i + j
    low = (both & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2, 4, 5)), (G, N, 8 * W))


@triton.jit
def activations(x, KIND: tl.constexpr, G: tl.constexpr, W: tl.constexpr, M: tl.constexpr):
    """``[8·G·W, M]`` → ``[G, 8·W, M]`` in the order of `values`."""
    if KIND == "int4":
        x = tl.permute(tl.reshape(x, (G, W, 2, 2, 2, M)), (0, 3, 1, 4, 2, 5))
    else:
        x = tl.permute(tl.reshape(x, (G, W, 2, 2, 2, M)), (0, 2, 1, 3, 4, 5))
    return tl.reshape(x, (G, 8 * W, M))


@triton.jit
def offset(x, KIND: tl.constexpr, N: tl.constexpr):
    """What the sums of each group begin with, fp32 ``[G, N, M]``: of int4, what takes 136 from each code."""
    if KIND == "int4":
        out = tl.dot(tl.full((x.shape[0], N, x.shape[1]), -136.0, tl.bfloat16), x)
    else:
        out = tl.zeros((x.shape[0], N, x.shape[2]), tl.float32)
    return out


@triton.jit
def words_of(w_ptr, n, live, k0, K, BK: tl.constexpr, WHOLE: tl.constexpr):
    """uint32 ``[N, BK / 8]`` from column k0 of rows ``n`` of codes; ``WHOLE``: K is whole steps."""
    word = tl.arange(0, BK // 8)
    if WHOLE:
        row, mask = n * (K // BK * (BK // 8)), live[:, None]
    else:
        row, mask = n * (K // 8), live[:, None] & (k0 // 8 + word < K // 8)[None, :]
    return tl.load(w_ptr + row[:, None] + k0 // 8 + word[None, :], mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def scale_places(n, live, k0, K, G: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr):
    """Where the scales of a step lie, ``[N, G]``, and which there are."""
    group = tl.arange(0, G)
    if WHOLE:
        row, mask = n * (K // (GROUP * G) * G), live[:, None] & (group >= 0)[None, :]
    else:
        row, mask = n * (K // GROUP), live[:, None] & (k0 // GROUP + group < K // GROUP)[None, :]
    return row[:, None] + k0 // GROUP + group[None, :], mask


@triton.jit
def plain_scales(s_ptr, at, mask, KIND: tl.constexpr):
    """Scales number ``at`` in fp32, bf16, or exponents of mxfp4."""
    scale = tl.load(s_ptr + at, mask=mask, other=0)
    if KIND == "mxfp4":  # 2^-127, which the shifted bits cannot say, is a subnormal
        scale = tl.where(scale == 0, 0x00400000, scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def scaled(sums, scales):
    """Sums ``[G, N, M]`` times scales ``[N, G]``."""
    return sums * tl.permute(scales, (1, 0))[:, :, None]
