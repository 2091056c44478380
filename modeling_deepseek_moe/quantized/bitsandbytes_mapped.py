"""Routed experts in bitsandbytes' 4-bit formats that stay in the memory-mapped files of a saved model.

Legend: E experts, R runs of 256 scales of a matrix.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.formats.row import WeightFormat
from modeling_deepseek_moe.ops.four_bit import NestedScales
from modeling_deepseek_moe.quantized.bitsandbytes_experts import (
    BitsAndBytesExperts,
    BitsAndBytesMatrices,
    addresses_in,
    nested_records,
)
from modeling_deepseek_moe.quantized.experts import QuantizedMatrix
from modeling_deepseek_moe.quantized.mapped import MappedExperts, Table


class MappedBitsAndBytesExperts(MappedExperts, BitsAndBytesMatrices):
    """Codes as they lie in the files and scales, plain ones, in memory: no load time, and streamed where memory is short."""

    nested = False

    def empty_stacks(self) -> BitsAndBytesExperts:
        settings = {"compute_dtype": self.compute_dtype, "source_dtype": self.source_dtype}
        return BitsAndBytesExperts(self._config, self.weight_format, nested=self.nested, **settings)


class MappedNestedExperts(MappedBitsAndBytesExperts):
    """Codes and the codes of scales as they lie in the files, and what scales these in memory: a 64th of them.

    Args:
        absmax: where the codes of scales are, in the order of ``codes``.
        nested_absmax: fp32 ``[E, R]`` of gate, up and down.
        offsets: fp32 ``[E, 3]``.
        table: fp32 ``[256]``.
    """

    nested = True

    def __init__(
        self,
        config,
        weight_format: WeightFormat,
        codes: Sequence[TensorInfo],
        absmax: Sequence[TensorInfo],
        files: MappedFiles,
        nested_absmax: Sequence[torch.Tensor],
        offsets: torch.Tensor,
        table: torch.Tensor,
    ):
        super().__init__(config, replace(weight_format, scale_dtype=torch.uint8), codes, absmax, files)
        self._nested, self._offsets, self._values = list(nested_absmax), offsets, table
        self._records: torch.Tensor | None = None  # that the addresses lead to

    def addresses(self) -> torch.Tensor:
        """As `MappedExperts.addresses`, of codes and of a record of each matrix' scales."""
        if self._addresses is None:
            found = super().addresses()
            inner = torch.stack([addresses_in(part) for part in self._nested], dim=1)
            self._records = nested_records(found[..., 1], inner, self._values.data_ptr(), self._offsets)
            found[..., 1] = addresses_in(self._records.flatten(0, 1)).view(self.num_experts, -1)
        return self._addresses

    def table(self) -> Table:
        return _NestedTable(self.addresses(), self._records)

    def matrices(self, index: int) -> dict[str, QuantizedMatrix]:
        found = super().matrices(index)
        for number, (name, matrix) in enumerate(found.items()):
            own = self._nested[number][index], self._values, self._offsets[index, number]
            found[name] = matrix._replace(scales=NestedScales(matrix.scales, *own))
        return found

    def keep(self, first: int, count: int) -> None:
        kept = slice(first, first + count)
        self._nested = [part[kept].clone() for part in self._nested]
        self._offsets = self._offsets[kept].clone()
        super().keep(first, count)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_records": None}


class _NestedTable(Table):
    """As `Table`, where scales are read to be found by records of its own."""

    def __init__(self, addresses: torch.Tensor, records: torch.Tensor):
        super().__init__(addresses, read=1)
        self._records = records.clone()
        self.addresses[..., 1] = addresses_in(self._records.flatten(0, 1)).view(len(records), -1)

    def fill(self, experts: list[int], found: torch.Tensor) -> None:
        self._records[experts, :, 0] = found[..., 1]
        super().fill(experts, found[..., :1])
