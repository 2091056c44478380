"""FP8-resident linear layers: one byte a parameter, dequantised tile by tile as they are used."""

from typing import ClassVar

import torch
from torch import nn

from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.ops import block_fp8


class Fp8Linear(KeepsDtype, nn.Linear):
    """``nn.Linear`` whose weight stays as released: E4M3 codes and ``weight_scale_inv``, never trained or cast.

    Gradients flow to the input, so adapters and unquantised layers below it train. Its own two tensors are
    parameters without gradient; ``block`` is the checkpoint's ``weight_block_size``.
    """

    dtype_kept: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv")
    # What peft asks of a layer that is quantised: its adapters' dtype, its codes (`W_q`), and `dequantize`.
    compute_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, in_features: int, out_features: int, bias: bool, block: tuple[int, int], device=None):
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.block = tuple(block)
        codes = torch.empty(out_features, in_features, dtype=block_fp8.FP8_DTYPE, device=device)
        scales = torch.empty(block_fp8.scale_shape(codes.shape, self.block), dtype=torch.float32, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return block_fp8.linear(x, self.weight, self.weight_scale_inv, self.bias, self.block)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight ``[out_features, in_features]`` in ``dtype``, as a fresh tensor."""
        return block_fp8.dequantize(self.weight, self.weight_scale_inv, dtype, self.block)

    @property
    def W_q(self) -> nn.Parameter:
        return self.weight

    def dequantize(self) -> torch.Tensor:
        return self.dequantized(self.compute_dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, block={self.block}"
