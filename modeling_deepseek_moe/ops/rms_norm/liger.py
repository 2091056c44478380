"""Liger's RMSNorm with gradients, where the machine has it and it is faster than plain torch's: see `_trials`."""

from functools import cache, partial

import torch
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops import _liger
from modeling_deepseek_moe.ops._dispatch import LIGER
from modeling_deepseek_moe.ops._libraries import Call, current, function_of
from modeling_deepseek_moe.ops.rms_norm import reference

CALL = Call("LigerRMSNormFunction", ("X", "W", "eps", "offset", "casting_mode", "in_place"))
MOST_BYTES = 1 << 16  # of a row


def unsuitable(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Why it is not taken; ``None`` if it is. The first call for such a shape tries it out."""
    reason = _liger.unsupported((CALL,), x, weight)
    if reason is None and (x.ndim < 2 or not x.numel() or x.shape[-1] * x.element_size() > MOST_BYTES):
        reason = f"is for rows of up to {MOST_BYTES} bytes, found {x.dtype} {list(x.shape)}"
    if reason is None and x.shape[-1:] != weight.shape:
        reason = f"wants a weight for each feature, found {list(x.shape)} and {list(weight.shape)}"
    own = partial(reference.rms_norm, eps=eps)
    return reason or _liger.unsuitable("RMSNorm", partial(rms_norm, eps=eps), own, x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference.rms_norm`; its gradients have none."""
    # gradients in a tensor of their own: what comes from above is a residual's too
    return _on_its_card(function_of(LIGER, CALL)).apply(x, weight, eps, 0.0, "llama", False)


@cache
def _on_its_card(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Liger's own on its tensors' card, which raises where its gradients are to be differentiated: else they would count as constants."""

    def forward(ctx, x, *others):
        with current(x.device):
            return function.forward(ctx, x, *others)

    def backward(ctx, gradient):
        with current(gradient.device):
            return function.backward(ctx, gradient)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type("RMSNorm", (function,), methods)
