"""A linear layer on codes and scales of any format: a tile of rows is decoded, multiplied with, and forgotten."""

from collections.abc import Callable

import torch

from modeling_deepseek_moe.ops.quantized_linear.reference import QuantizedLinear

__all__ = ["quantized_linear"]


def quantized_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    decode: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor],
    run: Callable | None = None,
) -> torch.Tensor:
    """``x [..., K] · Wᵀ + bias → [..., N]`` in the dtype of ``x``; differentiable in ``x`` and ``bias``.

    Args:
        codes: whose first dimension is N; ``scales`` has a row for every ``rows`` of them.
        decode: codes and scales of a range of rows, and a dtype → those rows of W.
        run: x, codes, scales and bias → y, where a backend has the whole product.
    """
    return QuantizedLinear.apply(x, codes, scales, bias, rows, decode, run)
