"""Routed experts in the checkpoint's memory-mapped files. Legend: E experts."""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import ClassVar

import torch

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.ops.experts import LowRank
from modeling_deepseek_moe.quantized.experts import QuantizedExperts, QuantizedMatrix, StackedQuantizedExperts

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Table:
    """Addresses ``[E, 3, 2]`` as `MappedExperts.addresses` has them, of which those of what is read are zero unless filled in."""

    def __init__(self, addresses: torch.Tensor, read: int):
        self.addresses = addresses.clone()
        self._read = self.addresses[..., :read]
        self._read.zero_()

    def fill(self, experts: list[int], found: torch.Tensor) -> None:
        """``found [experts, 3, read]``: where the codes of some experts are, and their scales if they are read too."""
        self._read[experts] = found

    def clear(self, experts: list[int]) -> None:
        self._read[experts] = 0


class MappedExperts(QuantizedExperts):
    """Experts that stay in the checkpoint's memory-mapped files: no copy, no load time, no private memory.

    Codes and scales are no parameters: they have no place in ``state_dict``. What the module holds for its E·3 matrices is
    where they are; views are made as they are asked for. Saving writes the mapped bytes. Moved to another device (``.to``,
    `Trainer`, a pipeline) it becomes what it would have been, had it been loaded there: stacked experts with the same bytes.

    Args:
        codes: where the codes of ``gate_proj``, ``up_proj`` and ``down_proj`` are, of one expert after the other.
        scales: the scales of the same matrices in the same order: in one piece in memory, or where they are, if they
            stay in the files too.
        files: the mappings of the files that ``codes`` names.
    """

    # A file cut short while it is mapped kills the process, so it is looked at; more often would cost more than it saves.
    check_seconds: ClassVar[float] = 1.0

    def __init__(
        self,
        config,
        weight_format: WeightFormat,
        codes: Sequence[TensorInfo],
        scales: torch.Tensor | Sequence[TensorInfo],
        files: MappedFiles,
    ):
        super().__init__(config, weight_format)
        self._config = config
        self._files = files
        kept = () if isinstance(scales, torch.Tensor) else scales
        self._paths = tuple(dict.fromkeys(info.file for info in (*codes, *kept)))
        for path in self._paths:
            files.address(path)  # from here on the bytes are those that were checked, whatever becomes of the name
        numbers = {path: number for number, path in enumerate(self._paths)}
        self._prefix = codes[0].name.removesuffix(f".0.gate_proj.weight{weight_format.code_suffix}")
        width, hidden = config.moe_intermediate_size, config.hidden_size
        shapes = (width, hidden), (width, hidden), (hidden, width)
        self._shapes = tuple(map(weight_format.code_shape, shapes))
        self._scale_shapes = tuple(map(weight_format.scale_shape, shapes))
        ends = list(accumulate(math.prod(shape) for shape in self._scale_shapes))
        self._scale_ranges = tuple(zip([0, *ends[:-1]], ends, strict=True))  # within the scales of one expert

        def places(infos: Sequence[TensorInfo]) -> torch.Tensor:
            found = [(numbers[info.file], info.start) for info in infos]
            return torch.tensor(found, device="cpu").view(self.num_experts, len(PROJECTIONS), 2)

        self._places = places(codes)
        self._scales = scales.view(self.num_experts, -1) if isinstance(scales, torch.Tensor) else None
        self._scale_places = None if isinstance(scales, torch.Tensor) else places(scales)
        self._addresses: torch.Tensor | None = None
        self.first, self.is_part = 0, False  # the first expert's number in the release, and whether some are missing
        self.stream = None  # a `streaming.layer.LayerStream`, if experts are held in memory of their own

    def _apply(self, fn, recurse=True):
        moved = fn(torch.empty(0, device="cpu"))
        if moved.device.type == "cpu":
            return super()._apply(fn, recurse)
        self.restack(moved.device)
        return self

    def restack(self, device: torch.device | str) -> None:
        """Become stacked experts in memory of ``device``, with the same bytes: they are copied expert by expert.

        Raises:
            CheckpointError: a file was truncated or rewritten.
        """
        self._files.check_unchanged()
        with torch.device(device):
            stacked = self.empty_stacks()
        for index in range(self.num_experts):
            pairs = zip(stacked.matrices(index).values(), self.matrices(index).values(), strict=True)
            tensors = (pair for target, source in pairs for pair in zip(target.tensors, source.tensors, strict=True))
            for target, source in tensors:
                # as bytes: what copies them knows no dtype that it could round; scales in memory may be wider than on the disk
                raw = target.view(-1).view(torch.uint8)
                raw.copy_(source.to(target.dtype).reshape(-1).view(torch.uint8))
        stacked.train(self.training)
        # Not a new module: hooks, parents and whatever else refers to this one stay as they are.
        hooks = {name: value for name, value in self.__dict__.items() if "_hooks" in name}
        self.__class__ = type(stacked)
        self.__dict__.clear()
        self.__dict__.update(stacked.__dict__ | hooks)

    def keep(self, first: int, count: int) -> None:
        """Hold only ``count`` experts from ``first`` on, numbered from 0; other ranks hold the others."""
        kept = slice(first, first + count)
        self._places = self._places[kept].clone()
        self._scales = None if self._scales is None else self._scales[kept].clone()
        self._scale_places = None if self._scale_places is None else self._scale_places[kept].clone()
        self._config = copy.copy(self._config)
        self._config.n_routed_experts = self.num_experts = count
        self.first, self._addresses, self.is_part = self.first + first, None, True
        self.addresses()

    def refuse_part(self) -> None:
        """
        Raises:
            ValueError: other ranks have some of the experts.
        """
        if self.is_part:
            last = self.first + self.num_experts - 1
            raise ValueError(
                f"{self._prefix}: found experts {self.first} to {last} on this rank, wanted all of them: experts mapped by several "
                "ranks are not saved; the folder that they were loaded from has their bytes"
            )

    def empty_stacks(self) -> QuantizedExperts:
        """Stacked experts of this layer's shapes, without values, on the current device."""
        return StackedQuantizedExperts(self._config, self.weight_format)

    @property
    def files(self) -> MappedFiles:
        """The mappings of the checkpoint's files."""
        return self._files

    @property
    def matrix_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of gate, up and down."""
        return self._shapes

    def addresses(self) -> torch.Tensor:
        """Where every matrix lies in memory: ``[E, 3, 2]`` int64 on the CPU, of its codes and of its scales.

        Valid as long as this module lives. A copy of the module has its own.
        """
        if self._addresses is None:
            bases = torch.tensor([self._files.address(path) for path in self._paths], device="cpu")
            codes = bases[self._places[..., 0]] + self._places[..., 1]
            if self._scales is None:
                scales = bases[self._scale_places[..., 0]] + self._scale_places[..., 1]
            else:
                rows = torch.arange(self.num_experts, device="cpu") * self._scales[0].nbytes
                starts = [start * self._scales.itemsize for start, _ in self._scale_ranges]
                scales = self._scales.data_ptr() + rows[:, None] + torch.tensor(starts, device="cpu")
            self._addresses = torch.stack((codes, scales), dim=-1)
        return self._addresses

    def table(self) -> "Table":
        """`addresses` without those of what is read (see `reads`), for a cache to fill in."""
        return Table(self.addresses(), len(self.reads(0)) // len(PROJECTIONS))

    def infos(self, index: int) -> dict[str, TensorInfo]:
        """Where the codes of one expert lie in the files: ``gate_proj``, ``up_proj`` and ``down_proj``."""
        form = self.weight_format
        return self._infos(index, self._places, self._shapes, form.code_dtype, form.code_suffix)

    def reads(self, index: int) -> list[TensorInfo]:
        """All that is to be read of one expert: as `infos`, and then its scales, where these stay in the files too."""
        form, codes = self.weight_format, self.infos(index)
        if self._scale_places is None:
            return list(codes.values())
        scales = self._infos(index, self._scale_places, self._scale_shapes, form.scale_dtype, form.scale_suffix)
        return [*codes.values(), *scales.values()]

    def _infos(self, index: int, places: torch.Tensor, shapes, dtype: torch.dtype, suffix: str):
        found = {}
        for name, shape, (number, start) in zip(PROJECTIONS, shapes, places[index].tolist(), strict=True):
            full = f"{self._prefix}.{self.first + index}.{name}.weight{suffix}"
            end = start + math.prod(shape) * dtype.itemsize
            found[name] = TensorInfo(full, dtype, shape, self._paths[number], start, end)
        return found

    def routed(self, hidden_TD, topk_indices, topk_weights, low_rank: LowRank | None = None) -> torch.Tensor:
        self.check_files()
        # a backward pass reads the weights again, when streamed ones may be gone
        keeps = torch.is_grad_enabled() and hidden_TD.requires_grad
        if self.stream is not None and low_rank is None and not keeps:
            return self.stream.run(self, hidden_TD, topk_indices, topk_weights)
        return super().routed(hidden_TD, topk_indices, topk_weights, low_rank)

    def matrices(self, index: int) -> dict[str, QuantizedMatrix]:
        found = {}
        if self._scales is None:
            views = [self._files.view(info) for info in self.reads(index)]
            pairs = zip(PROJECTIONS, views[:3], views[3:], strict=True)
            return {name: QuantizedMatrix(codes, scales) for name, codes, scales in pairs}
        ranges = zip(self.infos(index).items(), self._scale_ranges, self._scale_shapes, strict=True)
        for (name, info), (start, end), scale_shape in ranges:
            found[name] = QuantizedMatrix(self._files.view(info), self._scales[index, start:end].view(scale_shape))
        return found

    def named_matrices(self) -> Iterator[tuple[str, QuantizedMatrix]]:
        """``("{expert}.{projection}", matrix)`` for every expert, as the release orders them.

        Raises:
            ValueError: other ranks have the others.
        """
        self.refuse_part()
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
        """Weights (codes, without scales) that are mapped."""
        values = sum(math.prod(shape) for shape in self._shapes) * 8 * self.weight_format.code_dtype.itemsize
        return self.num_experts * values // self.weight_format.bits

    @property
    def mapped_bytes(self) -> int:
        """Of their codes, and of scales that stay in the files too."""
        return self.num_experts * sum(info.nbytes for info in self.reads(0))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_addresses": None}  # those of this module's memory

    def extra_repr(self):
        return f"{self.num_experts} experts mapped, format={self.weight_format.name}, block={self.weight_format.block}"
