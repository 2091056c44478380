"""The small layers: RMSNorm, SwiGLU, and the rule that some tensors keep their dtype."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.activations import ACT2FN

from modeling_deepseek_moe.ops.rms_norm import rms_norm
from modeling_deepseek_moe.ops.swiglu import swiglu


class KeepsDtype(nn.Module):
    """A module some of whose tensors move between devices but are never cast by ``.to(dtype)`` and its kin.

    FP8 codes lose their meaning when cast, and scales and router biases lose bits that matter.

    Attributes:
        dtype_kept: their dtypes by name.
    """

    dtype_kept: Mapping[str, torch.dtype] = {}

    def _apply(self, fn, recurse=True):
        kept = [getattr(self, name) for name in self.dtype_kept]

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if any(tensor is other for other in kept):
                probe = fn(tensor.new_empty(0))
                if probe.dtype != tensor.dtype:
                    return tensor.to(probe.device)
            return fn(tensor)

        return super()._apply(move, recurse)

    def narrow(self) -> None:
        """Give tensors back the dtype that they are kept in, where ``parameter.data`` was set to a wider one, which lost nothing.

        As peft's `prepare_model_for_kbit_training` sets all parameters of 16 bits, scales too.
        """
        for name, dtype in self.dtype_kept.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype.itemsize > dtype.itemsize:
                tensor.data = tensor.data.to(dtype)

    def train(self, mode: bool = True):
        self.narrow()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.narrow()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class DeepseekRMSNorm(nn.Module):
    """``w · x / sqrt(mean(x²) + eps)`` over the last dimension, in fp32 whatever the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class DeepseekMLP(nn.Module):
    """SwiGLU: ``down(act(gate(x)) · up(x))``. Dense layers and shared experts."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj, self.act_fn)
