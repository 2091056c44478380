"""A linear layer on four-bit codes, and the weight that they stand for: by the CPU engine where it can.

Where it cannot, a linear layer is computed a tile of rows at a time.
"""

from functools import partial

import torch

from modeling_deepseek_moe.ops import four_bit
from modeling_deepseek_moe.ops._dispatch import CPU, TRITON, choose, may_use
from modeling_deepseek_moe.ops._native import unsupported_activations
from modeling_deepseek_moe.ops.four_bit import cpu, triton
from modeling_deepseek_moe.ops.quantized_linear import quantized_linear

Scales = torch.Tensor | four_bit.NestedScales


def decode(
    codes: torch.Tensor, scales: Scales, dtype: torch.dtype, block: tuple[int, int], *, kind: str
) -> torch.Tensor:
    """As `four_bit.decode`, to the bit."""
    fits = dtype in cpu.OUTPUTS and codes.ndim == 2
    if fits and may_use(CPU, cpu.unsupported_codes(kind, codes, scales, block)):
        return cpu.dequantize(codes, cpu.parts_of(scales), dtype, kind)
    return four_bit.decode(codes, scales, dtype, block, kind=kind)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: Scales,
    bias: torch.Tensor | None,
    block: tuple[int, int],
    *,
    kind: str,
) -> torch.Tensor:
    """``x [..., K] · Wᵀ + bias → [..., N]`` in ``x.dtype``; differentiable in ``x`` and ``bias``.

    Args:
        codes, scales: of a weight ``[N, K]`` of one of `four_bit.KINDS`.
        block: ``(1, group)``.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    columns = 2 * codes.shape[-1] * codes.itemsize
    if not x.ndim or x.shape[-1] != columns:
        features = x.shape[-1] if x.ndim else "no"
        raise ValueError(f"input has {features} features, the {kind} weight [{len(codes)}, {columns}] wants {columns}")
    reason = cpu.unsupported_codes(kind, codes, scales, block) or unsupported_activations(x)
    decode = partial(four_bit.decode, block=block, kind=kind)
    on_a_gpu = triton.unsupported_linear(x) or triton.unsupported_codes(kind, codes, scales, block)
    backend = choose("four-bit linear", {CPU: reason, TRITON: on_a_gpu})
    if backend == "reference":
        if isinstance(scales, four_bit.NestedScales):
            scales = four_bit.expand(scales)  # a tile's are a range of rows, and nested ones lie in runs over all
        return quantized_linear(x, codes, scales, bias, block[0], decode)
    native = cpu if backend == CPU else triton
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and needs_grad):
        return native.linear(x, codes, cpu.parts_of(scales), bias, kind)
    if isinstance(scales, four_bit.NestedScales):
        scales = four_bit.expand(scales)

    def run(x, codes, scales, bias):
        return native.linear(x, codes, [scales], bias, kind)

    def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (
            native.dequantize(codes, [scales], dtype, kind)
            if dtype in native.OUTPUTS
            else decode(codes, scales, dtype)
        )

    return quantized_linear(x, codes, scales, bias, block[0], dequantize, run)
