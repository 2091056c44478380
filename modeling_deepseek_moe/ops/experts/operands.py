"""A layer's routed experts as operands: stacks, or where each matrix lies in memory."""

from typing import NamedTuple

import torch
from torch import nn

from modeling_deepseek_moe.ops._operands import BLOCK
from modeling_deepseek_moe.ops.experts import cpu

STACKS = ("gate_up_proj", "down_proj", "gate_up_proj_scale_inv", "down_proj_scale_inv")


class Operands(NamedTuple):
    """Either ``stacks``: gate and up ``[E, 2I, D]``, down ``[E, D, I]`` and the scales of both (``None``: bf16);
    or ``addresses [E, 3, 2]`` int64 of the codes and scales of every matrix.

    ``width`` is I, ``dtype`` that of the weights.
    """

    stacks: tuple[torch.Tensor | None, ...]
    addresses: torch.Tensor | None
    width: int
    dtype: torch.dtype


def operands(module: nn.Module) -> Operands:
    """Of a layer of experts, whatever its home. Parametrised stacks are made here, once."""
    if hasattr(module, "addresses"):
        return Operands((), module.addresses(), module.matrix_shapes[0][0], torch.float8_e4m3fn)
    # a module's own look-ups take longer than the rest of a small layer
    own = module._parameters
    stacks = tuple(own[name] if name in own else getattr(module, name, None) for name in STACKS)
    return Operands(stacks, None, stacks[1].shape[-1], stacks[0].dtype)


def unsupported_reason(module: nn.Module, weights: Operands, hidden_TD: torch.Tensor) -> str | None:
    """Why the CPU engine cannot run these experts on such activations; ``None`` if it can."""
    block = getattr(module, "block", BLOCK)
    if block != BLOCK:
        return f"has blocks of {BLOCK[0]} × {BLOCK[1]} only, found {block}"
    return cpu.unsupported_reason(hidden_TD, module.act_fn, *weights.stacks[:2])
