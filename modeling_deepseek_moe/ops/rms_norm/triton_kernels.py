"""Triton kernel of RMSNorm, alone or after a residual's sum: one pass over the rows.

Legend: R rows, D features.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, D, eps, sx, sr, DP: tl.constexpr, ADD: tl.constexpr):
    """sum = x + residual with ADD, in the dtype of x; out = w · sum / sqrt(mean(sum²) + eps), all [R, D]. grid (R,).

    The quotient is rounded to the dtype of x before the product with w, as the reference has it.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    m = d < D
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * sx + d, mask=m, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(residual_ptr + row * sr + d, mask=m, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * D + d, total, mask=m)
        x = total.to(tl.float32)
    quotient = (x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=m, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + d, (weight * quotient).to(out_ptr.dtype.element_ty), mask=m)
