"""Linear layers whose weight stays in a checkpoint's format, decoded tile by tile as it is used."""

from typing import ClassVar

import torch
from torch import nn

from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.layers import KeepsDtype


class QuantizedLinear(KeepsDtype, nn.Linear):
    """``nn.Linear`` whose weight stays as released: codes and scales in a `WeightFormat`, never trained or cast.

    Gradients flow to the input, so adapters and unquantised layers below it train. Its own two tensors are parameters
    without gradient: ``weight``, the codes, and ``weight`` with the format's suffix, such as ``weight_scale_inv``.
    """

    # What peft asks of a layer that is quantised: its adapters' dtype, its codes (`W_q`), and `dequantize`.
    compute_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, in_features: int, out_features: int, bias: bool, weight_format: WeightFormat, device=None):
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.weight_format = weight_format
        shape, self._scale = (out_features, in_features), f"weight{weight_format.scale_parameter}"
        codes = torch.empty(weight_format.code_shape(shape), dtype=weight_format.code_dtype, device=device)
        scales = torch.empty(weight_format.scale_shape(shape), dtype=weight_format.scale_dtype, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter(self._scale, nn.Parameter(scales, requires_grad=False))
        self.dtype_kept = {"weight": codes.dtype, self._scale: scales.dtype}

    @property
    def scale(self) -> nn.Parameter:
        """The scales of the codes."""
        return self._parameters[self._scale]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.weight_format.multiply(x, self.weight, self.scale, self.bias)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight ``[out_features, in_features]`` in ``dtype``, as a fresh tensor."""
        return self.weight_format.dequantize(self.weight, self.scale, dtype)

    @property
    def W_q(self) -> nn.Parameter:
        return self.weight

    def dequantize(self) -> torch.Tensor:
        return self.dequantized(self.compute_dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, format={self.weight_format.name}, block={self.weight_format.block}"
