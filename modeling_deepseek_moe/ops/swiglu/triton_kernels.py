"""Triton kernel of SwiGLU's activation."""

import triton
import triton.language as tl


@triton.jit
def activate(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = silu(gate) · up, all [size]; computed in fp32, rounded once. grid (ceil(size/BLOCK),)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=i < size)
