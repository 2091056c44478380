"""A layer's routed experts as operands: stacks, or where each matrix lies in memory."""

from typing import NamedTuple

import torch
from torch import nn

from modeling_deepseek_moe.ops._library import PLAIN
from modeling_deepseek_moe.ops._operands import unsupported_format
from modeling_deepseek_moe.ops.experts import cpu

STACKS = ("gate_up_proj", "down_proj")
SCALE_SUFFIX = "_scale_inv"  # of stacks whose module names no format
SLOT = "_expert_table"  # where a module carries the table that was made of its stacks


class Operands(NamedTuple):
    """``stacks``: gate and up ``[E, 2I, D]``, down ``[E, D, I]`` and the scales of both (``None``: bf16), none for mapped
    experts; ``addresses [E, 3, 2]`` int64 of the codes and scales of every matrix, or ``None`` where the engine cannot
    read the stacks where they lie, or a graph is being compiled, which knows no addresses.

    ``width`` is I, ``dtype`` that of the weights.
    """

    stacks: tuple[torch.Tensor | None, ...]
    addresses: torch.Tensor | None
    width: int
    dtype: torch.dtype


class _Table:
    """The addresses of a module's stacks, until one of them is another. Copies and pickles of it are ``None``."""

    def __init__(self, names: tuple[str, ...], stacks: tuple[torch.Tensor | None, ...]):
        self.names, self.stacks = names, stacks
        self.pointers = [(stack.data_ptr(), stack.shape) for stack in stacks if stack is not None]
        self.operands = Operands(stacks, cpu.addresses_of(*stacks), stacks[1].shape[-1], stacks[0].dtype)

    def is_of(self, own: dict) -> bool:
        place = 0
        for name, stack in zip(self.names, self.stacks, strict=True):
            if own.get(name) is not stack:
                return False
            if stack is not None:
                pointer, shape = self.pointers[place]
                if stack.data_ptr() != pointer or stack.shape != shape:
                    return False
                place += 1
        return True

    def __reduce__(self):
        return type(None), ()


def operands(module: nn.Module) -> Operands:
    """Of a layer of experts, however its weights are stored. Parametrised stacks are made here, once per call."""
    if hasattr(type(module), "addresses"):
        return Operands((), module.addresses(), module.matrix_shapes[0][0], module.weight_format.code_dtype)
    own = module._parameters  # a module's own look-ups take longer than the rest of a small layer
    weight_format = module.__dict__.get("weight_format")
    suffix = weight_format.scale_suffix if weight_format is not None else SCALE_SUFFIX
    names = (*STACKS, STACKS[0] + suffix, STACKS[1] + suffix)
    if STACKS[0] not in own or STACKS[1] not in own:
        stacks = module.gate_up_proj, module.down_proj, None, None
        return Operands(stacks, None, stacks[1].shape[-1], stacks[0].dtype)
    if torch.compiler.is_compiling():
        stacks = tuple(own.get(name) for name in names)
        return Operands(stacks, None, stacks[1].shape[-1], stacks[0].dtype)
    table = module.__dict__.get(SLOT)
    if table is None or not table.is_of(own):
        stacks = tuple(map(own.get, names))
        if not all(stack is None or _is_readable(stack) for stack in stacks):
            return Operands(stacks, None, stacks[1].shape[-1], stacks[0].dtype)
        table = module.__dict__[SLOT] = _Table(names, stacks)
    return table.operands


def unsupported_reason(module: nn.Module, weights: Operands, hidden_TD: torch.Tensor) -> str | None:
    """Why the CPU engine cannot run these experts on such activations; ``None`` if it can."""
    if "weight_format" in module.__dict__ and (reason := unsupported_format(module.weight_format)) is not None:
        return reason
    return cpu.unsupported_reason(hidden_TD, module.act_fn, *weights.stacks[:2])


def _is_readable(stack: torch.Tensor) -> bool:
    """Whether C can read a stack where it lies; scales too, which are fp32."""
    return (
        type(stack) in PLAIN
        and stack.device.type == "cpu"
        and stack.is_contiguous()
        and (stack.ndim == 3 and (stack.dtype in cpu.WEIGHTS or stack.dtype == torch.float32))
    )
