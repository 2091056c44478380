"""A layer's routed experts as operands: stacks, or where each matrix lies in memory."""

from typing import NamedTuple

import torch
from torch import nn

from modeling_deepseek_moe.ops._library import PLAIN
from modeling_deepseek_moe.ops._operands import unsupported_format
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.experts import cpu
from modeling_deepseek_moe.ops.four_bit.cpu import SCALE_DTYPES
from modeling_deepseek_moe.ops.four_bit.reference import KINDS

STACKS = ("gate_up_proj", "down_proj")
SCALE_SUFFIX = "_scale_inv"  # of stacks whose module names no format
READABLE = (*cpu.WEIGHTS, torch.float32, torch.uint8, torch.int32, torch.float8_e8m0fnu)  # codes and scales
SLOT = "_expert_table"  # where a module carries the table that was made of its stacks


class Operands(NamedTuple):
    """``stacks``: gate and up ``[E, 2I, D]``, down ``[E, D, I]`` and the scales of both (``None``: bf16), none for mapped
    experts; ``addresses [E, 3, 2]`` int64 of the codes and scales of every matrix, or ``None`` where the engine cannot
    read the stacks where they lie, or a graph is being compiled, which knows no addresses.

    ``width`` is I, ``dtype`` that of the weights; ``kind``: of codes of four bits, see `_operands.Operand`.
    """

    stacks: tuple[torch.Tensor | None, ...]
    addresses: torch.Tensor | None
    width: int
    dtype: torch.dtype
    kind: str | None = None


class _Table:
    """The addresses of a module's stacks, until one of them is another. Copies and pickles of it are ``None``."""

    def __init__(self, names: tuple[str, ...], stacks: tuple[torch.Tensor | None, ...], kind: str | None):
        self.names, self.stacks = names, stacks
        self.pointers = [(stack.data_ptr(), stack.shape) for stack in stacks if stack is not None]
        self.operands = Operands(stacks, cpu.addresses_of(*stacks), *_width_and_dtype(stacks), kind)

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
        row, kind = module.weight_format, kind_of(module)
        return Operands((), module.addresses(), module.matrix_shapes[0][0], row.code_dtype, kind)
    own = module._parameters  # a module's own look-ups take longer than the rest of a small layer
    weight_format = module.__dict__.get("weight_format")
    suffix = weight_format.scale_parameter if weight_format is not None else SCALE_SUFFIX
    kind = kind_of(module)
    names = (*STACKS, STACKS[0] + suffix, STACKS[1] + suffix)
    if STACKS[0] not in own or STACKS[1] not in own:
        stacks = module.gate_up_proj, module.down_proj, None, None
        return Operands(stacks, None, *_width_and_dtype(stacks))
    if torch.compiler.is_compiling():
        stacks = tuple(own.get(name) for name in names)
        return Operands(stacks, None, *_width_and_dtype(stacks), kind)
    table = module.__dict__.get(SLOT)
    if table is None or not table.is_of(own):
        stacks = tuple(map(own.get, names))
        wanted = torch.float32 if kind is None else SCALE_DTYPES[kind]
        is_cast = any(scales is not None and scales.dtype != wanted for scales in stacks[2:])
        if is_cast or not all(stack is None or _is_readable(stack) for stack in stacks):
            return Operands(stacks, None, *_width_and_dtype(stacks), kind)
        table = module.__dict__[SLOT] = _Table(names, stacks, kind)
    return table.operands


def unsupported_reason(module: nn.Module, weights: Operands, hidden_TD: torch.Tensor) -> str | None:
    """Why the CPU engine cannot run these experts on such activations; ``None`` if it can."""
    if "weight_format" in module.__dict__ and (reason := unsupported_format(module.weight_format)) is not None:
        return reason
    if weights.kind is None:
        reason = cpu.unsupported_reason(hidden_TD, module.act_fn, *weights.stacks[:2])
        return reason or (_misfit(hidden_TD.shape[-1], *weights.stacks[:2]) if weights.stacks else None)
    if weights.addresses is None:
        return "computes four-bit experts from plain tensors on the CPU in the format's dtypes alone, in no graph"
    group = KINDS[weights.kind.removesuffix(NESTED)].group
    if weights.width % group:
        return f"takes {weights.kind} rows of whole groups of {group}, found experts of width {weights.width}"
    return cpu.unsupported_reason(hidden_TD, module.act_fn)


def _misfit(hidden: int, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Whether stacks are not those of as many experts, on activations of ``hidden`` features: some were pruned, others not."""
    experts, width = down.shape[0], down.shape[-1]
    if gate_up.shape == (experts, 2 * width, hidden) and down.shape == (experts, hidden, width):
        return None
    return f"takes stacks [E, 2I, {hidden}] and [E, {hidden}, I], found {list(gate_up.shape)} and {list(down.shape)}"


def kind_of(module: nn.Module) -> str | None:
    """One of `_structs.FOUR_BIT` for a layer of experts whose codes are of four bits."""
    weight_format = module.__dict__.get("weight_format")
    if weight_format is None or weight_format.kernel not in KINDS:
        return None
    return weight_format.kernel + (NESTED if getattr(module, "nested", False) else "")


def _width_and_dtype(stacks: tuple[torch.Tensor | None, ...]) -> tuple[int, torch.dtype]:
    return stacks[0].shape[1] // 2, stacks[0].dtype


def _is_readable(stack: torch.Tensor) -> bool:
    """Whether C can read a stack where it lies; scales too."""
    return (
        type(stack) in PLAIN
        and stack.device.type == "cpu"
        and stack.is_contiguous()
        and (stack.ndim == 3 and stack.dtype in READABLE)
    )
