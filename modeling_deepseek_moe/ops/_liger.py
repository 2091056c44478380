"""What the two operations that may be Liger's have in common: both are for training on a card, in eager mode."""

from collections.abc import Callable

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._dispatch import LIGER
from modeling_deepseek_moe.ops._libraries import Call, lacks, refusal
from modeling_deepseek_moe.ops._trials import Trial, random, step, trials

Function = Callable[..., torch.Tensor]
TOLERANCES = {
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
    torch.float32: 1e-5,
}  # two roundings, and sums in another order


def unsupported(calls: tuple[Call, ...], *tensors: torch.Tensor) -> str | None:
    """Why Liger does not compute this with gradients; ``None`` if it may be tried."""
    if torch.compiler.is_compiling():
        return "is not called in graphs, whose compiler fuses such operations itself"
    reason = _triton.unsupported_reason(*tensors, gradients=True) or _triton.unsupported_floats(*tensors)
    if reason is None and any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
        reason = f"takes plain tensors, found {', '.join(sorted({type(tensor).__name__ for tensor in tensors}))}"
    reason = reason or refusal(LIGER, _triton.capability(tensors[0].device))
    return reason or next(filter(None, (lacks(LIGER, call) for call in calls)), None)


def unsuitable(operation: str, theirs: Function, own: Function, *tensors: torch.Tensor) -> str | None:
    """Why it is not taken for tensors of such shapes; ``None`` if it is.

    Args:
        theirs, own: of the tensors; both are run forwards and backwards.
    """
    rows = _triton.power_of_two(tensors[0].shape[:-1].numel())
    needed = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors)

    def make() -> Trial:
        size, tensor = min(tensors[0].shape[-1], 1024), tensors[0]
        small = [random(*([24] if t.ndim > 1 else []), size, like=tensor, seed=i) for i, t in enumerate(tensors)]
        return Trial(
            lambda: step(theirs, small, (True,) * len(small)),
            lambda: step(own, small, (True,) * len(small)),
            TOLERANCES[tensor.dtype],
            lambda: step(theirs, tensors, needed),
            lambda: step(own, tensors, needed),
        )

    return trials().reason(LIGER, operation, tensors[0], (tensors[0].shape[-1], rows, *needed), make)
