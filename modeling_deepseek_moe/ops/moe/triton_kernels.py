"""Triton kernel of the end of a mixture-of-experts layer: a token's sums, and the norm that the next layer begins with.

Legend: T tokens, K experts per token, D hidden size, E experts.
"""

import triton
import triton.language as tl


@triton.jit
def combine_and_norm(
    y_ptr, indices_ptr, shared_ptr, residual_ptr, norm_ptr, sum_ptr, out_ptr, E, D, eps, TOP_K: tl.constexpr, DP: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """``sum = residual + (Σ_k y[t·K + k] + shared)`` ``[T, D]`` and its RMSNorm, each rounded as the layers' own are. Grid: T."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, DP)
    here = n < D
    dtype = residual_ptr.dtype.element_ty
    total = tl.zeros((DP,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        served = tl.load(indices_ptr + slot) < E
        total += tl.load(y_ptr + slot * D + n, mask=here & served, other=0.0)
    total = total.to(dtype).to(tl.float32)
    if SHARED:
        total += tl.load(shared_ptr + token * D + n, mask=here, other=0.0).to(dtype).to(tl.float32)
        total = total.to(dtype).to(tl.float32)
    total += tl.load(residual_ptr + token * D + n, mask=here, other=0.0).to(tl.float32)
    rounded = total.to(dtype)
    tl.store(sum_ptr + token * D + n, rounded, mask=here)
    x = rounded.to(tl.float32)
    quotient = (x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)).to(dtype).to(tl.float32)
    weight = tl.load(norm_ptr + n, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + n, (weight * quotient).to(dtype), mask=here)
