"""Codes of weights as the exact bf16 that tensor cores multiply, two codes a register, in integer operations that SM80 has.

Imported by kernels only: it needs Triton. A tile of int32 words ``[N, W]`` becomes ``[N, 2W]`` values, the lower half of each
register first. The bits of a code are shifted to where bf16 has its exponent and mantissa, and the difference of the
exponents' biases is multiplied back there, value by value: subnormal codes are subnormal bf16 before it, which no card's
bf16 multiplication flushes. In the scale of a block the factor would make subnormal fp32 products, which tensor cores may
flush.
"""

import triton
import triton.language as tl


@triton.jit
def halves(bits):
    """uint32 ``[N, W]`` → bf16 ``[N, 2W]``: lower half, upper half, lower half."""
    low = (bits & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), (bits.shape[0], 2 * bits.shape[1]))


@triton.jit
def e4m3(words, ODD: tl.constexpr):
    """FP8 codes 0 and 2 of each word of four, ``ODD``: 1 and 3. The codes 0x7F and 0xFF, which are NaN, become ±480."""
    if ODD:
        bits = ((words >> 4) & 0x07F007F0) | (words & 0x80008000)
    else:
        bits = ((words << 4) & 0x07F007F0) | ((words << 8) & 0x80008000)
    return halves(bits) * tl.full((), 2.0**120, tl.bfloat16)


@triton.jit
def int4(words, PART: tl.constexpr):
    """Codes PART and PART + 4 of each word of eight, 0 to 15, as -8 to 7."""
    # 128 + code is a bf16 whose lowest bits are the code
    return halves(((words >> (4 * PART)) & 0x000F000F) | 0x43004300) - tl.full((), 136.0, tl.bfloat16)


@triton.jit
def e2m1(words, PART: tl.constexpr):
    """MXFP4 codes PART and PART + 4 of each word of eight."""
    own = words >> (4 * PART)
    bits = ((own << 6) & 0x01C001C0) | ((own << 12) & 0x80008000)
    return halves(bits) * tl.full((), 2.0**126, tl.bfloat16)


@triton.jit
def by_table(words, table_ptr, PART: tl.constexpr):
    """The two codes of byte PART of each word of four bytes, of a table ``[256]`` of int32 with two bf16 for every byte."""
    index = ((words >> (8 * PART)) & 0xFF).to(tl.int32)
    return halves(tl.load(table_ptr + index).to(tl.uint32, bitcast=True))


@triton.jit
def e4m3_bytes(raw):
    """FP8 codes one by one, uint8 of any shape; for what is read once, in twice the operations of `e4m3`."""
    wide = raw.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 4)
    return bits.to(tl.bfloat16, bitcast=True) * tl.full((), 2.0**120, tl.bfloat16)


@triton.jit
def encode8(v):
    """fp32 of at most 448 in magnitude, or NaN, as E4M3 codes (uint8), to the nearest, ties to even."""
    bits = v.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_tiles(x, POWER: tl.constexpr, NATIVE: tl.constexpr):
    """Codes (uint8) of tiles x fp32 ``[M, K]`` and their scales ``[M]``.

    A scale is amax / 448, up to a power of two with POWER, 1 for zeros; NaN or Inf make it NaN or Inf. NATIVE: SM89's conversion.
    """
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full((x.shape[0],), 448.0, tl.float32))
    if POWER:
        bits = tl.maximum(scale, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
        scale = tl.where(scale > 0, ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True), scale)
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    v = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    v = tl.where(v > 448.0, 448.0, tl.where(v < -448.0, -448.0, v))
    raw = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if NATIVE else encode8(v)
    return raw, scale
