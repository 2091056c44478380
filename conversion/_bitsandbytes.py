"""A folder of bitsandbytes' codes to be converted: NF4 and FP4, nested scales too, and int8; a matrix is read at a time."""

import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch

from modeling_deepseek_moe.bnb.formats import (
    BLOCK,
    INT8,
    announced,
    check_storage,
    is_bitsandbytes,
    ragged,
    split_part,
)
from modeling_deepseek_moe.bnb.layers import check_state, check_table
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.conversion._source import Source, quantization_of
from modeling_deepseek_moe.formats import WeightFormat, by_name
from modeling_deepseek_moe.formats.row import Scales
from modeling_deepseek_moe.ops.four_bit import NestedScales

Matrix = tuple[torch.Tensor, Scales]


def open_folder(folder: Path) -> Source:
    """A `Source` of whatever format the folder has."""
    source = Source(folder)
    fields = quantization_of(source.config)
    return BitsAndBytesSource(folder) if isinstance(fields, dict) and is_bitsandbytes(fields) else source


class BitsAndBytesSource(Source):
    """As `Source`, of a saved model with bitsandbytes' layers and experts: a weight is codes where the module's tensors say so."""

    @cached_property
    def weight_formats(self) -> tuple[WeightFormat, ...]:
        try:
            check_storage(quantization_of(self.config))
            (row,) = announced(quantization_of(self.config))
        except ValueError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from None
        return (row if row is INT8 else by_name(row.name),)

    def split(self, name: str) -> tuple[str, str | None]:
        return split_part(name)

    def format_of(self, info: TensorInfo) -> WeightFormat | None:
        form = self.weight_format
        if not info.name.endswith(".weight") or info.dtype != form.code_dtype:
            return None
        if form is INT8 or self._shape(info)[1] % BLOCK == 0:
            return form
        return ragged(form)

    def is_codes(self, info: TensorInfo) -> bool:
        return info.name.endswith(".weight") and info.dtype == self.weight_format.code_dtype

    def value_shape(self, name: str) -> tuple[int, ...]:
        info = self.reader[name]
        return self._shape(info) if self.is_codes(info) else info.shape

    def _shape(self, info: TensorInfo) -> tuple[int, ...]:
        return info.shape if self.weight_format is INT8 else tuple(self._state(info)["shape"])

    @cached_property
    def _states(self) -> dict[str, dict]:
        return {}

    def _state(self, info: TensorInfo) -> dict:
        """What bitsandbytes wrote down of a 4-bit matrix, as the config's model has it and as its tensors lie; read once."""
        if info.name not in self._states:
            self._states[info.name] = self._read_state(info)
        return self._states[info.name]

    def _read_state(self, info: TensorInfo) -> dict:
        kind, spec = self.weight_format.name, self.specs.get(info.name)
        if spec is None:
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found codes of a weight that the config has no place for"
            )
        state = self._part(info, f".quant_state.bitsandbytes__{kind}")
        nested = f"{info.name}.nested_absmax" in self.reader
        return check_state(self.reader, state, kind, (spec.shape[0], spec.shape[-1]), nested)

    def _part(self, info: TensorInfo, suffix: str, wanted: tuple[int, torch.dtype] | None = None) -> TensorInfo:
        name = (info.name.removesuffix(".weight") if suffix == ".SCB" else info.name) + suffix
        if name not in self.reader:
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found codes without {name}, wanted all of a weight's"
            )
        part = self.reader[name]
        if wanted is not None and (part.shape, part.dtype) != ((wanted[0],), wanted[1]):
            raise CheckpointError(
                f"{part.file}: tensor {name}: found {part.dtype} {list(part.shape)}, wanted {wanted[1]} {[wanted[0]]}"
            )
        return part

    def scale_infos(self, info: TensorInfo) -> list[TensorInfo]:
        """Of codes: what changes with them, scales, and the scales of nested ones.

        Raises:
            CheckpointError: one is missing, or not of the matrix' shape.
        """
        if self.weight_format is INT8:
            return [self._part(info, ".SCB", (info.shape[0], torch.float32))]
        rows, columns = self._shape(info)
        if columns % 2 or info.shape != (rows * columns // 2, 1):
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found {list(info.shape)} codes for {[rows, columns]}, wanted two values of a row "
                "in each"
            )
        check_table(self.reader, self._part(info, ".quant_map"), self.weight_format.name)
        blocks = -(-rows * columns // BLOCK)
        if f"{info.name}.nested_absmax" not in self.reader:
            return [self._part(info, ".absmax", (blocks, torch.float32))]
        nested = self._part(info, ".nested_absmax", (-(-blocks // 256), torch.float32))
        return [self._part(info, ".absmax", (blocks, torch.uint8)), nested]

    def matrix(self, info: TensorInfo) -> Matrix:
        """Codes ``[N, ...]`` and scales as the row of the format takes them."""
        form, infos = self.format_of(info), self.scale_infos(info)
        assert form is not None, info.name
        scales = [self._finite(own) for own in infos]
        if form is INT8:
            return self.read(info), scales[0]
        rows = self._shape(info)[0]
        codes, own = self.read(info).view(rows, -1), scales[0] if form.renew else scales[0].view(rows, -1)
        if len(scales) == 1:
            return codes, own
        table = self._finite(self._part(info, ".nested_quant_map", (256, torch.float32)))
        return codes, NestedScales(own, scales[1], table, torch.tensor(self._state(info)["nested_offset"]))

    def _finite(self, info: TensorInfo) -> torch.Tensor:
        values = self.read(info)
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise CheckpointError(f"{info.file}: tensor {info.name}: found a NaN or Inf, wanted finite scales")
        return values

    def named(self, info: TensorInfo, matrix: Matrix) -> dict[str, torch.Tensor]:
        """A matrix' codes and scales by their tensors' names."""
        codes, scales = matrix
        values = scales[:2] if isinstance(scales, NestedScales) else (scales,)
        infos = [info, *self.scale_infos(info)]
        return {own.name: tensor.reshape(own.shape) for own, tensor in zip(infos, (codes, *values), strict=True)}

    def value_tiles(self, info: TensorInfo, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        form = self.format_of(info)
        if form is None:
            yield from super().value_tiles(info, step)
            return
        values = form.dequantize(*self.matrix(info), torch.float32)
        yield slice(0, len(values)), values

    def check_scales_have_weights(self) -> None:
        for name, info in self.reader.items():
            weight, suffix = self.split(name)
            if suffix and (weight not in self.reader or not self.is_codes(self.reader[weight])):
                raise CheckpointError(f"{info.file}: tensor {name}: found it without the codes of {weight}")


class MadeTogether:
    """Tensors by name that are made in one go though they are written one after the other, and again where one is gone.

    Args:
        held: of all such groups of a job. A thread holds the rest of one, the last: a run that goes on with an earlier one's
            work never takes all of a group that lies in two files.
    """

    def __init__(self, make: Callable[[], dict[str, torch.Tensor]], held: threading.local):
        self._make, self._held = make, held

    def take(self, name: str) -> torch.Tensor:
        owner, rest = getattr(self._held, "last", (None, {}))
        if owner is not self or name not in rest:
            self._held.last = None, {}
            rest = self._make()
            self._held.last = self, rest
        return rest.pop(name)
