"""The routed experts in their homes: stacked and trainable, stacked FP8, or mapped straight from the files.

All take ``hidden [T, D]``, ``topk_indices [T, K]``, ``topk_weights [T, K]`` and return ``[T, D]``.
Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, R rows routed to one expert.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from modeling_deepseek_moe.headers import TensorInfo
from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.mapped import MappedFiles
from modeling_deepseek_moe.ops import block_fp8, experts
from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._library import PLAIN
from modeling_deepseek_moe.ops.experts import RoutedSwiGlu, run_experts

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class EngineTable(NamedTuple):
    """Experts as the CPU engine takes them: ``addresses [E, 3, 2]`` of codes and scales, their width and dtype."""

    addresses: torch.Tensor
    width: int
    dtype: torch.dtype


def _needs_gradients(topk_weights: torch.Tensor) -> str | None:
    """Why the CPU engine cannot weigh experts: the router is being trained, if nothing else is."""
    return "computes no gradients" if torch.is_grad_enabled() and topk_weights.requires_grad else None


class _Known(NamedTuple):
    """What the CPU engine has to know of stacks: found out once, and again when one of them is another."""

    key: list
    refusal: str | None  # why it cannot use them, whatever the activations
    addresses: torch.Tensor | None


def _know(module: nn.Module, *stacks: torch.Tensor | None) -> _Known:
    """Of gate and up, down, and the scales of both."""
    known, act_fn = module._known, module.act_fn
    key = [act_fn]
    for stack in stacks:
        if stack is None:
            key.append(None)
        elif type(stack) in PLAIN:
            key.append((stack.data_ptr(), stack.shape, stack.dtype, stack.is_contiguous()))
        else:
            key.append(object())  # equal to nothing
    if known is not None and known.key == key:
        return known
    refusal = experts.cpu.refuses_layer(act_fn, *stacks[:2])
    usable = refusal is None and all(scale is None or _is_plain(scale) for scale in stacks[2:])
    # setting an attribute of a module takes longer than all else here
    module._known = _Known(key, refusal, experts.cpu.addresses_of(*stacks) if usable else None)
    return module._known


def _refuses(module: nn.Module, hidden_TD: torch.Tensor, *stacks: torch.Tensor | None) -> str | None:
    """As `experts.cpu.refuses`."""
    weights = stacks[:2]
    if torch.compiler.is_compiling():  # a graph knows no addresses
        return experts.cpu.refuses(hidden_TD, module.act_fn, *weights)
    return experts.cpu.refuses_call(hidden_TD, *weights) or _know(module, *stacks).refusal


def _run_stacks(module: nn.Module, hidden_TD, topk_indices, topk_weights, *stacks: torch.Tensor | None):
    """Stacked experts on the CPU engine, which did not refuse them."""
    addresses = None if torch.compiler.is_compiling() else module._known.addresses
    if addresses is None:
        return experts.cpu.stacked(hidden_TD, topk_indices, topk_weights, *stacks)
    width, dtype = module.intermediate_dim, stacks[0].dtype
    return experts.cpu.routed(hidden_TD, topk_indices, topk_weights, addresses, width, dtype)


def _table(module: nn.Module, hidden_TD: torch.Tensor) -> EngineTable | None:
    """See `EngineTable`; ``None`` where the CPU engine cannot run the experts."""
    refusal, known = module._refusal(hidden_TD), module._known  # which nothing has set in a graph of a fresh model
    if refusal is not None or known is None or known.addresses is None:
        return None
    return EngineTable(known.addresses, module.intermediate_dim, module.gate_up_proj.dtype)


def _is_plain(scale: torch.Tensor) -> bool:
    """Whether C can read a scale where it lies."""
    return scale.dtype == torch.float32 and scale.is_contiguous()


@use_experts_implementation
class _StackedExperts(nn.Module):
    """Stacked weights under the names that transformers' grouped kernels and parallel plans expect."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD, topk_indices, topk_weights):
        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            gate_RI, up_RI = F.linear(x_RD, self.gate_up_proj[index]).chunk(2, dim=-1)
            return F.linear(self.act_fn(gate_RI) * up_RI, self.down_proj[index])

        return run_experts(hidden_TD, topk_indices, topk_weights, expert, self.num_experts)


class DeepseekExperts(_StackedExperts):
    """Trainable experts: ``gate_up_proj [E, 2I, D]``, ``down_proj [E, D, I]``; honours ``experts_implementation``."""

    _known: _Known | None = None

    def forward(self, hidden_TD, topk_indices, topk_weights):
        if may_use(CPU, self._refusal(hidden_TD) or _needs_gradients(topk_weights)):
            return _run_stacks(self, hidden_TD, topk_indices, topk_weights, *self._stacks())
        device_type = hidden_TD.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_TD.dtype
        if self._may_loop(hidden_TD):
            return RoutedSwiGlu.apply(hidden_TD, topk_indices, topk_weights, self.gate_up_proj, self.down_proj, dtype)
        if self.gate_up_proj.dtype != dtype and autocast:
            # The grouped kernels are no autocast ops: with fp32 weights they would run in fp32 throughout.
            cast = {name: weight.to(dtype) for name, weight in self.named_parameters(recurse=False)}
            return functional_call(self, cast, (hidden_TD.to(dtype), topk_indices, topk_weights))
        return super().forward(hidden_TD, topk_indices, topk_weights)

    def _may_loop(self, hidden_TD: torch.Tensor) -> bool:
        """Whether to take the experts one by one: on a CPU, where the grouped kernels do too, and copy more for it."""
        return (
            hidden_TD.device.type == "cpu"
            and self._implementation_is_free
            and not torch.compiler.is_compiling()  # how many rows an expert gets is no constant of a graph
            and experts.cpu.is_silu(self.act_fn)
            # else nobody asked for weights to be cast to what the hidden states are
            and (torch.is_autocast_enabled("cpu") or hidden_TD.dtype == self.gate_up_proj.dtype)
            and all(type(stack) in PLAIN for stack in (hidden_TD, self.gate_up_proj, self.down_proj))
        )

    @property
    def _implementation_is_free(self) -> bool:
        """Whether nobody wished for one: transformers itself chooses "grouped_mm"."""
        return self.config._experts_implementation in (None, "grouped_mm")

    def _stacks(self) -> tuple[torch.Tensor | None, ...]:
        return self.gate_up_proj, self.down_proj, None, None

    def _refusal(self, hidden_TD: torch.Tensor) -> str | None:
        if torch.is_autocast_enabled(hidden_TD.device.type):
            return "does not run under autocast"
        if not self._implementation_is_free:
            return "is not the implementation that was asked for"
        return _refuses(self, hidden_TD, *self._stacks())

    def engine_table(self, hidden_TD: torch.Tensor) -> EngineTable | None:
        """See `EngineTable`; ``None`` where the CPU engine cannot run the experts."""
        return _table(self, hidden_TD)


@dataclass(frozen=True)
class Fp8Matrix:
    """E4M3 codes ``[N, K]`` and their fp32 ``scale_inv``."""

    weight: torch.Tensor
    scale_inv: torch.Tensor

    def linear(self, x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        return block_fp8.linear(x, self.weight, self.scale_inv, None, block)


class _Fp8Experts(KeepsDtype):
    """What the FP8 homes share: the forward pass over `matrices`, one expert and one tile at a time."""

    def __init__(self, config, block: tuple[int, int]):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.block = tuple(block)
        self.act_fn = ACT2FN[config.hidden_act]

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        """``gate_proj [I, D]``, ``up_proj [I, D]`` and ``down_proj [D, I]`` of one expert."""
        raise NotImplementedError

    def engine(self, hidden_TD, topk_indices, topk_weights) -> torch.Tensor | None:
        """The layer in one call of the CPU engine, or ``None`` where that cannot run."""
        raise NotImplementedError

    def forward(self, hidden_TD, topk_indices, topk_weights):
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "torch.export: FP8 experts run one by one, those that tokens chose, which no exported program can; "
                'load the model with quantization_config=FineGrainedFP8Config(dequantize=True), dtype="bfloat16"'
            )
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        out_TD = self.engine(hidden_TD, topk_indices, topk_weights)
        if out_TD is not None:
            return out_TD

        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            return self.expert(self.matrices(index).values(), x_RD)

        return run_experts(hidden_TD, topk_indices, topk_weights, expert, self.num_experts)

    def expert(self, matrices: Iterable[Fp8Matrix], x_RD: torch.Tensor) -> torch.Tensor:
        """One expert, of gate, up and down, by the reference."""
        gate, up, down = matrices
        return down.linear(self.act_fn(gate.linear(x_RD, self.block)) * up.linear(x_RD, self.block), self.block)


class StackedFp8Experts(_Fp8Experts):
    """FP8 experts stacked on one device; gate and up keep scales of their own, so any width has its ragged edge."""

    stack_names: ClassVar[tuple[str, ...]] = (
        "gate_up_proj",
        "down_proj",
        "gate_up_proj_scale_inv",
        "down_proj_scale_inv",
    )
    dtype_kept: ClassVar[tuple[str, ...]] = stack_names

    def __init__(self, config, block: tuple[int, int]):
        super().__init__(config, block)
        e, i, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        rows_ID, cols_ID = block_fp8.scale_shape((i, d), self.block)
        rows_DI, cols_DI = block_fp8.scale_shape((d, i), self.block)
        self.intermediate_dim, self.scale_rows = i, rows_ID
        for name, shape, dtype in (
            ("gate_up_proj", (e, 2 * i, d), block_fp8.FP8_DTYPE),
            ("gate_up_proj_scale_inv", (e, 2 * rows_ID, cols_ID), torch.float32),
            ("down_proj", (e, d, i), block_fp8.FP8_DTYPE),
            ("down_proj_scale_inv", (e, rows_DI, cols_DI), torch.float32),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self._known: _Known | None = None

    def _stacks(self) -> tuple[torch.Tensor, ...]:
        found = self._parameters  # four of a module's own look-ups take longer than the rest of a small layer
        return tuple(found[name] for name in self.stack_names)

    def _refusal(self, hidden_TD: torch.Tensor) -> str | None:
        stacks = self._stacks()
        return _refuses(self, hidden_TD, *stacks) or block_fp8.cpu.refuses_blocks(stacks[0], self.block)

    def engine(self, hidden_TD, topk_indices, topk_weights):
        if not may_use(CPU, self._refusal(hidden_TD) or _needs_gradients(topk_weights)):
            return None
        return _run_stacks(self, hidden_TD, topk_indices, topk_weights, *self._stacks())

    def engine_table(self, hidden_TD: torch.Tensor) -> EngineTable | None:
        """See `EngineTable`; ``None`` where the CPU engine cannot run the experts."""
        return _table(self, hidden_TD)

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        gate, up = self.gate_up_proj[index].split(self.intermediate_dim)
        gate_scale, up_scale = self.gate_up_proj_scale_inv[index].split(self.scale_rows)
        return {
            "gate_proj": Fp8Matrix(gate, gate_scale),
            "up_proj": Fp8Matrix(up, up_scale),
            "down_proj": Fp8Matrix(self.down_proj[index], self.down_proj_scale_inv[index]),
        }


class MappedExperts(_Fp8Experts):
    """FP8 experts that stay in the checkpoint's memory-mapped files: no copy, no load time, no private memory.

    Codes and scales are no parameters: they have no place in ``state_dict`` and never leave the CPU. What the module
    holds for its E·3 matrices is where they are; views are made as they are asked for. Saving writes the mapped bytes.

    Args:
        codes: where the codes of ``gate_proj``, ``up_proj`` and ``down_proj`` are, of one expert after the other.
        scales: the fp32 scales of the same matrices in the same order, in one piece.
        files: the mappings of the files that ``codes`` names.
    """

    # A file cut short while it is mapped kills the process, so it is looked at; more often would cost more than it saves.
    check_seconds: ClassVar[float] = 1.0

    def __init__(
        self,
        config,
        block: tuple[int, int],
        codes: Sequence[TensorInfo],
        scales: torch.Tensor,
        files: MappedFiles,
    ):
        super().__init__(config, block)
        self._files = files
        self._paths = tuple(dict.fromkeys(info.file for info in codes))
        for path in self._paths:
            files.address(path)  # from here on the bytes are those that were checked, whatever becomes of the name
        numbers = {path: number for number, path in enumerate(self._paths)}
        self._prefix = codes[0].name.removesuffix(".0.gate_proj.weight")
        self._shapes = tuple(info.shape for info in codes[: len(PROJECTIONS)])
        self._scale_shapes = tuple(block_fp8.scale_shape(shape, self.block) for shape in self._shapes)
        ends = list(accumulate(math.prod(shape) for shape in self._scale_shapes))
        self._scale_ranges = tuple(zip([0, *ends[:-1]], ends, strict=True))  # within the scales of one expert
        places = [(numbers[info.file], info.start) for info in codes]
        self._places = torch.tensor(places, device="cpu").view(self.num_experts, len(PROJECTIONS), 2)
        self._scales = scales.view(self.num_experts, -1)
        self._addresses: torch.Tensor | None = None
        self.stream = None  # a `streaming.layer.LayerStream`, if experts are held in memory of their own

    @property
    def files(self) -> MappedFiles:
        """The mappings of the checkpoint's files."""
        return self._files

    @property
    def matrix_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of gate, up and down."""
        return self._shapes

    def addresses(self) -> torch.Tensor:
        """Where every matrix lies in memory: ``[E, 3, 2]`` int64 on the CPU, of its codes and of its fp32 scales.

        Valid as long as this module lives. A copy of the module has its own.
        """
        if self._addresses is None:
            bases = torch.tensor([self._files.address(path) for path in self._paths], device="cpu")
            codes = bases[self._places[..., 0]] + self._places[..., 1]
            rows = torch.arange(self.num_experts, device="cpu") * self._scales[0].nbytes
            starts = [start * self._scales.itemsize for start, _ in self._scale_ranges]
            scales = self._scales.data_ptr() + rows[:, None] + torch.tensor(starts, device="cpu")
            self._addresses = torch.stack((codes, scales), dim=-1)
        return self._addresses

    def infos(self, index: int) -> dict[str, TensorInfo]:
        """Where the codes of one expert lie in the files: ``gate_proj``, ``up_proj`` and ``down_proj``."""
        found = {}
        for name, shape, (number, start) in zip(PROJECTIONS, self._shapes, self._places[index].tolist(), strict=True):
            full = f"{self._prefix}.{index}.{name}.weight"
            end = start + math.prod(shape)
            found[name] = TensorInfo(full, block_fp8.FP8_DTYPE, shape, self._paths[number], start, end)
        return found

    def _refusal(self, hidden_TD: torch.Tensor) -> str | None:
        return experts.cpu.refuses(hidden_TD, self.act_fn) or block_fp8.cpu.refuses_blocks(hidden_TD, self.block)

    def engine_table(self, hidden_TD: torch.Tensor) -> EngineTable | None:
        """See `EngineTable`; ``None`` where the CPU engine cannot run the experts, or they arrive one by one.

        Raises:
            CheckpointError: see `check_files`.
        """
        if self.stream is not None or self._refusal(hidden_TD) is not None:
            return None
        self.check_files()
        return EngineTable(self.addresses(), self._shapes[0][0], block_fp8.FP8_DTYPE)

    def engine(self, hidden_TD, topk_indices, topk_weights):
        self.check_files()
        may_run = may_use(CPU, self._refusal(hidden_TD) or _needs_gradients(topk_weights))
        # a backward pass reads the weights again, when streamed ones may be gone
        if self.stream is not None and not (torch.is_grad_enabled() and hidden_TD.requires_grad):
            return self.stream.run(self, hidden_TD, topk_indices, topk_weights, may_run)
        if not may_run:
            return None
        width = self._shapes[0][0]
        return experts.cpu.routed(hidden_TD, topk_indices, topk_weights, self.addresses(), width, block_fp8.FP8_DTYPE)

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        found = {}
        ranges = zip(self.infos(index).items(), self._scale_ranges, self._scale_shapes, strict=True)
        for (name, info), (start, end), scale_shape in ranges:
            found[name] = Fp8Matrix(self._files.view(info), self._scales[index, start:end].view(scale_shape))
        return found

    def named_matrices(self) -> Iterator[tuple[str, Fp8Matrix]]:
        """``("{expert}.{projection}", matrix)`` for every expert, as the release orders them."""
        self._files.check_unchanged()
        for index in range(self.num_experts):
            for name, matrix in self.matrices(index).items():
                yield f"{index}.{name}", matrix

    def check_files(self) -> None:
        """Before the codes are read: raise if their files, or others of the checkpoint, changed in place.

        Looks once in `check_seconds` for all layers together, since they share ``files``.

        Raises:
            CheckpointError: a file was truncated, where reading on would kill the process, or rewritten.
        """
        self._files.check_unchanged(self.check_seconds)

    @property
    def num_mapped(self) -> int:
        """Parameters (codes, without scales) that are mapped."""
        return self.num_experts * sum(math.prod(shape) for shape in self._shapes)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_addresses": None}  # those of this module's memory

    def extra_repr(self):
        return f"{self.num_experts} experts mapped, block={self.block}"


HOMES = (DeepseekExperts, StackedFp8Experts, MappedExperts)
