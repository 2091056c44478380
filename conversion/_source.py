"""A checkpoint folder to be converted: its headers, its config, and tensors read one at a time by range.

Tensors are read, not mapped: pages of a mapping count as the process's own memory until the system takes them back.
"""

import math
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.contents import refuse_other_makers
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.ranges import read_range
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.scales import WANTED_SCALES, first_unusable
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.weights import TensorSpec, release_tensors

TILE_BYTES, AHEAD_BYTES = 4 << 20, 32 << 20


def quantization_of(config: dict) -> dict | None:
    """What ``config.json`` announces, of the model or of the text model in it."""
    text = config.get("text_config")
    return config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)


class Source:
    """Tensors and config of a checkpoint folder. Safe to read from several threads."""

    def __init__(self, folder: str | Path, reader: CheckpointReader | None = None):
        self.folder = Path(folder)
        refuse_other_makers(self.folder)
        self.reader = CheckpointReader.open(self.folder) if reader is None else reader
        self._lock = threading.Lock()

    @cached_property
    def config(self) -> dict:
        """``config.json`` as it stands, unknown fields included."""
        return read_json(self.folder / "config.json", "the config of the checkpoint")

    @cached_property
    def weight_formats(self) -> tuple[WeightFormat, ...]:
        """Those of its codes: the config's, or FP8 where the config says nothing of them.

        Raises:
            CheckpointError: the config announces one that is not supported.
        """
        try:
            announced = quantization_of(self.config)
            fields = announced and {"quant_method": formats.FP8.method, **announced}
            return formats.all_of_config(fields) or (formats.FP8,)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from None

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """What a release with this config holds, by its own names.

        Raises:
            ValueError: no config of a model type that is known, or fields that are refused.
        """
        config = read_config(self.folder)
        return {config.names.released(name): spec for name, spec in release_tensors(config).items()}

    @property
    def weight_format(self) -> WeightFormat:
        """The first of its formats, and mostly the only one."""
        return self.weight_formats[0]

    def format_of(self, info: TensorInfo) -> WeightFormat | None:
        """Which of them a tensor has, if it is a weight's codes."""
        if len(info.shape) != 2 or formats.split_scale(info.name)[1] is not None:
            return None
        named = (form for form in self.weight_formats if info.name.endswith(form.code_suffix))
        return next((form for form in named if form.code_dtype == info.dtype), None)

    def is_codes(self, info: TensorInfo) -> bool:
        """Whether a tensor is a weight's codes."""
        return self.format_of(info) is not None

    def holding(self, name: str) -> TensorInfo | None:
        """The tensor with a weight's values, or with its codes."""
        held = (self.reader.get(name + form.code_suffix) for form in self.weight_formats)
        return self.reader.get(name) or next(filter(None, held), None)

    def value_shape(self, name: str) -> tuple[int, ...]:
        """Of a weight that is there; several of its values share an element of some codes."""
        info = self.holding(name)
        assert info is not None, name
        form = self.format_of(info)
        return info.shape if form is None else form.value_shape(info.shape)

    def scale_name(self, name: str) -> str:
        """Of the scales that belong to codes of this name."""
        info = self.reader.get(name)
        form = (info and self.format_of(info)) or self.weight_format
        return formats.weight_name(name) + form.scale_suffix

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.nbytes:
            memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            with self._lock:  # the guard against files that change keeps state
                stream = self.reader.mapped.open(info.file)
            with stream:
                if hasattr(os, "posix_fadvise"):  # what comes next is on its way meanwhile
                    os.posix_fadvise(stream.fileno(), info.end, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                read_range(stream, info.start, memory, f"{info.file}: tensor {info.name}")
        return tensor

    def tiles(self, info: TensorInfo, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """The tensor in ranges of rows that a cache holds, each but the last a multiple of ``step`` rows."""
        if len(info.shape) < 2 or not info.nbytes:
            yield slice(0, info.shape[0] if info.shape else 1), self.read(info)
            return
        width = info.nbytes // info.shape[0]
        rows = max(1, TILE_BYTES // (width * step)) * step
        for first in range(0, info.shape[0], rows):
            end = min(first + rows, info.shape[0])
            start = info.start + first * width
            part = info._replace(shape=(end - first, *info.shape[1:]), start=start, end=info.start + end * width)
            yield slice(first, end), self.read(part)

    def value_tiles(self, info: TensorInfo, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `tiles`, codes as the fp32 values that they stand for."""
        form = self.format_of(info)
        if form is None:
            yield from self.tiles(info, step)
            return
        scale = self.read_scale(self.scale_of(info))
        for rows, codes in self.tiles(info, math.lcm(step, form.block[0])):
            yield rows, form.dequantize(codes, scale[form.scale_rows(rows)], torch.float32)

    def values(self, info: TensorInfo) -> torch.Tensor:
        """All of a tensor in fp32."""
        return torch.cat([values.float() for _, values in self.value_tiles(info)])

    def split(self, name: str) -> tuple[str, str | None]:
        """The weight that a tensor belongs to, and its suffix if it is not the values or the codes."""
        return formats.split_scale(formats.weight_name(name))

    def scale_of(self, info: TensorInfo) -> TensorInfo:
        """The scales that belong to a weight's codes: present, of the format's dtype and shape."""
        name, form = self.scale_name(info.name), self.format_of(info) or self.weight_format
        if name not in self.reader:
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found {form.title} without {name}, wanted its scales"
            )
        scale = self.reader[name]
        shape = form.value_shape(info.shape) if len(info.shape) == 2 else None
        wanted = shape and form.scale_shape(shape)
        if scale.dtype != form.scale_dtype or scale.shape != wanted:
            raise CheckpointError(
                f"{scale.file}: tensor {name}: found {scale.dtype} {list(scale.shape)}, wanted {form.scale_dtype} "
                f"{wanted and list(wanted)} for {list(shape or info.shape)} in blocks of {list(form.block)}"
            )
        return scale

    def read_scale(self, info: TensorInfo) -> torch.Tensor:
        """The values of scales, all of them usable."""
        values = self.read(info)
        found = first_unusable(values)
        if found is not None:
            value, where = found
            raise CheckpointError(f"{info.file}: tensor {info.name}: found {value} at {where}, wanted {WANTED_SCALES}")
        return values

    def check_scales_have_weights(self) -> None:
        """Scales without codes would be lost in a conversion: an error instead."""
        for name, info in self.reader.items():
            weight, suffix = formats.split_scale(name)
            named = [self.reader.get(weight + form.code_suffix) for form in self.weight_formats]
            if suffix and not any(codes and self.is_codes(codes) for codes in named):
                found = next((codes.dtype for codes in named if codes), "absent")
                raise CheckpointError(
                    f"{info.file}: tensor {name}: found its weight {found}, wanted {self.weight_format.code_dtype}"
                )


def as_is(source: Source, info: TensorInfo, name: str | None = None) -> TensorPlan:
    """A tensor to be written byte for byte, under its own name or another."""
    return TensorPlan(name or info.name, info.dtype, info.shape, lambda: (tile for _, tile in source.tiles(info)))
