"""Liger's ``silu(gate) · up`` with gradients, where the machine has it and it is faster than plain torch's: see `_trials`."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops import _liger
from modeling_deepseek_moe.ops._dispatch import LIGER
from modeling_deepseek_moe.ops._libraries import Call, current, function_of

FORWARD, BACKWARD = Call("swiglu_forward", ("a", "b")), Call("swiglu_backward", ("a", "b", "dc"))
MOST_FEATURES = 1 << 16


def unsuitable(gate: torch.Tensor, up: torch.Tensor) -> str | None:
    """Why it is not taken; ``None`` if it is. The first call for such a shape tries it out."""
    reason = _liger.unsupported((FORWARD, BACKWARD), gate, up)
    if reason is None and (
        gate.shape != up.shape or gate.ndim < 2 or not gate.numel() or gate.shape[-1] > MOST_FEATURES
    ):
        reason = f"is for gate and up of one shape, of up to {MOST_FEATURES} features, found {list(gate.shape)} and {list(up.shape)}"
    return reason or _liger.unsuitable("SwiGLU", activate, lambda gate, up: F.silu(gate) * up, gate, up)


class SiluProduct(torch.autograd.Function):
    """Liger writes gradients over gate and up; here over copies, since somebody else may hold those or ask again."""

    @staticmethod
    def forward(ctx, gate, up):
        function = function_of(LIGER, FORWARD)
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        with current(gate.device):
            return function(gate, up)[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        function = function_of(LIGER, BACKWARD)
        gate, up = (tensor.clone() for tensor in ctx.saved_tensors)
        with current(gate.device):
            return function(gate, up, gradient.contiguous())


def activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up``, both ``[..., D]``."""
    return SiluProduct.apply(gate, up)
