"""Routed experts in bitsandbytes' own formats: 4-bit codes (NF4, FP4) as of a ``Linear4bit``, or int8 rows as of a ``Linear8bitLt``.

In 4 bits the definition is a layer in which every projection of every expert is a ``bitsandbytes.nn.Linear4bit`` made from the
same weight: the same codes, scales and products. In 8 bits it is a layer with the weights that ``Linear8bitLt`` holds, multiplied
with the activations as they are: int8 activations, whose outliers bitsandbytes then computes apart, would save nothing here.
Legend: E experts, D hidden size, I expert width, N rows and K columns of a matrix, B its blocks of 64 values.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from modeling_deepseek_moe.bnb.formats import BLOCK, dequantize, multiply, quant_state, ragged
from modeling_deepseek_moe.formats.row import WeightFormat
from modeling_deepseek_moe.ops.experts import LowRank
from modeling_deepseek_moe.ops.four_bit import NESTED_GROUP, NestedScales
from modeling_deepseek_moe.quantized.experts import QuantizedExperts, QuantizedMatrix

RECORD = 32  # bytes that tell the CPU engine of nested scales: three addresses, and the offset in fp32
MAP = "nested_quant_map"  # what the codes of nested scales stand for, one table a layer


class BitsAndBytesMatrices(QuantizedExperts):
    """What experts in bitsandbytes' formats share, however they lie: products, weights and what is saved, of `matrices`.

    Attributes:
        compute_dtype: what hidden states are cast to for a product; ``None``: they stay as they are.
        source_dtype: of the weights that were quantised, which bitsandbytes writes down.
    """

    compute_dtype: torch.dtype | None = None
    source_dtype: torch.dtype = torch.bfloat16

    @property
    def is_four_bit(self) -> bool:
        return self.weight_format.bits == 4

    def routed(self, hidden_TD, topk_indices, topk_weights, low_rank: LowRank | None = None) -> torch.Tensor:
        given = hidden_TD
        if self.compute_dtype is not None and self.compute_dtype.itemsize < hidden_TD.dtype.itemsize:
            given = hidden_TD.to(self.compute_dtype)  # a wider one changes nothing: the engine adds up in fp32
        return super().routed(given, topk_indices, topk_weights, low_rank).to(hidden_TD.dtype)

    def expert(self, matrices, x_RD: torch.Tensor) -> torch.Tensor:
        gate, up, down = matrices
        return self._product(self.act_fn(self._product(x_RD, gate)) * self._product(x_RD, up), down)

    def _product(self, x: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
        """``x · Wᵀ`` by bitsandbytes, differentiable in ``x``, computed and returned in the dtypes of a ``Linear4bit``."""
        if not self.is_four_bit:
            return self.weight_format.multiply(x, *matrix)
        given = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return multiply(self.weight_format.name, given, *matrix).to(x.dtype)

    def dequantized(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
        """As `QuantizedExperts.dequantized`, by bitsandbytes."""
        if not self.is_four_bit:
            return super().dequantized(matrix, dtype)
        return dequantize(self.weight_format.name, *matrix, dtype)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a module of bitsandbytes would save for every projection of every expert: ``0.gate_proj.weight`` and so on."""
        for index in range(self.num_experts):
            for projection, matrix in self.matrices(index).items():
                name = f"{index}.{projection}"
                if self.is_four_bit:
                    yield f"{name}.weight", matrix.codes.view(-1, 1)
                    for part, tensor in (
                        quant_state(self.weight_format.name, *matrix, self.source_dtype).as_dict(packed=True).items()
                    ):
                        yield f"{name}.weight.{part}", tensor
                else:
                    yield f"{name}.weight", matrix.codes
                    yield f"{name}.SCB", matrix.scales
                    yield f"{name}.weight_format", torch.tensor(0, dtype=torch.uint8)  # rows, one after the other


class BitsAndBytesExperts(BitsAndBytesMatrices):
    """Experts whose codes and scales are parameters of this module, stacked.

    | of gate; up and down alike | 4 bits | nested (double quantisation) | 8 bits |
    |---|---|---|---|
    | ``gate_codes`` | uint8 ``[E, N·K/2]`` | uint8 ``[E, N·K/2]`` | int8 ``[E, N·K]`` |
    | ``gate_absmax`` | fp32 ``[E, B]`` | uint8 ``[E, B]`` | fp32 ``[E, N]`` |
    | ``gate_nested_absmax`` | | fp32 ``[E, ⌈B/256⌉]`` | |
    | ``gate_nested_offset`` | | fp32 ``[E]`` | |

    Args:
        weight_format: ``nf4``, ``fp4`` or ``int8``.
        nested: whether the scales are quantised themselves.

    Raises:
        ValueError: rows of an odd length, of which two values would share a byte across rows.
    """

    def __init__(
        self,
        config,
        weight_format: WeightFormat,
        nested: bool,
        compute_dtype: torch.dtype | None,
        source_dtype: torch.dtype,
    ):
        i, d = config.moe_intermediate_size, config.hidden_size
        is_whole = i % BLOCK == d % BLOCK == 0
        super().__init__(config, weight_format if is_whole or weight_format.bits != 4 else ragged(weight_format))
        self.compute_dtype, self.source_dtype, self.nested = compute_dtype, source_dtype, nested
        self.shapes = {"gate_proj": (i, d), "up_proj": (i, d), "down_proj": (d, i)}
        if self.is_four_bit and (i % 2 or d % 2):
            raise ValueError(
                f"moe_intermediate_size={i}, hidden_size={d}: found an odd number, wanted even ones for 4-bit experts; "
                "llm_int8_skip_modules=['lm_head', 'experts'] leaves them as they are"
            )
        self._addresses: torch.Tensor | None = None
        self._found: list | None = None  # of which tensors the addresses are
        self._records: torch.Tensor | None = None  # that they lead to
        self.dtype_kept: dict[str, torch.dtype] = {}
        for projection in self.shapes:
            for part, (shape, dtype) in self.layout(projection).items():
                self._add(parameter_of(projection, part), torch.empty((self.num_experts, *shape), dtype=dtype))
        if nested:
            self._add(MAP, torch.empty(256))

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.dtype_kept[name] = tensor.dtype

    def layout(self, projection: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of one expert's tensors, codes first: shape and dtype of each part of a projection (see `parameter_of`)."""
        rows, columns = self.shapes[projection]
        if not self.is_four_bit:
            return {"codes": ((rows * columns,), torch.int8), "absmax": ((rows,), torch.float32)}
        blocks = math.ceil(rows * columns / BLOCK)
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows * columns // 2,), torch.uint8),
            "absmax": ((blocks,), torch.float32),
        }
        if self.nested:
            parts["absmax"] = (blocks,), torch.uint8
            parts["nested_absmax"] = (math.ceil(blocks / NESTED_GROUP),), torch.float32
            parts["nested_offset"] = (), torch.float32
        return parts

    @property
    def num_values(self) -> int:
        """Weights that the codes stand for."""
        return self.num_experts * sum(rows * columns for rows, columns in self.shapes.values())

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A floating-point matrix ``[N, K]`` as bitsandbytes quantises it, named and shaped as `layout` says, on its device."""
        if not self.is_four_bit:
            codes, absmax = self.weight_format.quantize(weight)
            return {"codes": codes.view(-1), "absmax": absmax}
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=self.nested, quant_type=self.weight_format.name
        )
        found = {"codes": codes.view(-1), "absmax": state.absmax}
        if self.nested:
            found |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
        return found

    def matrices(self, index: int) -> dict[str, QuantizedMatrix]:
        return self.matrices_by(lambda stack: stack[index])

    def matrices_by(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, QuantizedMatrix]:
        """As `matrices`, of the expert that ``pick`` takes out of a stack ``[E, ...]``."""
        own, found = self._parameters, {}
        for projection, (rows, columns) in self.shapes.items():
            codes, scales, *nested = (pick(own[parameter_of(projection, part)]) for part in self.layout(projection))
            codes = codes.view(rows, -1)
            if self.is_four_bit and columns % BLOCK == 0:
                scales = scales.view(rows, -1)
            if self.nested:
                absmax, offset = nested
                scales = NestedScales(scales, absmax, own[MAP], offset)
            found[projection] = QuantizedMatrix(codes, scales)
        return found

    def stacked(self) -> dict[str, QuantizedMatrix]:
        """As `matrices`, of all experts in 4 bits whose blocks end with their rows: ``[E, N, ·]``, views of the parameters."""
        own, found = self._parameters, {}
        for projection, (rows, _) in self.shapes.items():
            codes, scales, *nested = (own[parameter_of(projection, part)] for part in self.layout(projection))
            codes, scales = (tensor.view(self.num_experts, rows, -1) for tensor in (codes, scales))
            if self.nested:
                absmax, offset = nested
                scales = NestedScales(scales, absmax, own[MAP], offset)
            found[projection] = QuantizedMatrix(codes, scales)
        return found

    @property
    def is_aligned(self) -> bool:
        """Whether no block of a 4-bit matrix goes on in the next row, as the CPU engine wants it."""
        return self.is_four_bit and not any(columns % BLOCK for _, columns in self.shapes.values())

    @property
    def matrix_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the codes of gate, up and down."""
        return tuple(map(self.weight_format.code_shape, self.shapes.values()))

    def addresses(self) -> torch.Tensor | None:
        """Where the CPU engine finds every matrix: ``[E, 3, 2]`` int64, of codes and of scales, or of a record of nested ones.

        ``None`` where it cannot read them: on another device, and where a block goes on in the next row. While a graph is
        compiled it is what was found before.
        """
        if torch.compiler.is_compiling():
            return self._addresses
        own = [parameter for parameter in self._parameters.values() if parameter is not None]
        found = [(parameter.data_ptr(), parameter.shape) for parameter in own]
        if found != self._found:
            is_readable = self.is_aligned and all(p.device.type == "cpu" and p.is_contiguous() for p in own)
            self._addresses = self._find() if is_readable else None
            self._found = found
        return self._addresses

    def _find(self) -> torch.Tensor:
        own, places, inner, offsets = self._parameters, [], [], []
        for projection in self.shapes:
            codes, absmax, *nested = (own[parameter_of(projection, part)] for part in self.layout(projection))
            places.append(torch.stack((addresses_in(codes), addresses_in(absmax)), dim=-1))
            if self.nested:
                inner.append(addresses_in(nested[0]))
                offsets.append(nested[1])
        found = torch.stack(places, dim=1)
        if self.nested:
            parts = torch.stack(inner, dim=1), own[MAP].data_ptr(), torch.stack(offsets, dim=1)
            self._records = nested_records(found[..., 1], *parts)
            found[..., 1] = addresses_in(self._records.flatten(0, 1)).view(self.num_experts, -1)
        return found

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_addresses": None, "_found": None, "_records": None}  # those of this module's memory

    def extra_repr(self):
        kind = f"{self.weight_format.name}{', nested scales' if self.nested else ''}"
        return f"{self.num_experts} experts, format={kind}, compute_dtype={self.compute_dtype}"


def parameter_of(projection: str, part: str) -> str:
    """The name of a parameter: ``gate_absmax``."""
    return f"{projection.removesuffix('_proj')}_{part}"


def nested_records(codes: torch.Tensor, absmax: torch.Tensor, table: int, offsets: torch.Tensor) -> torch.Tensor:
    """What the engine reads of nested scales, ``[E, 3, 4]`` int64, of the addresses ``[E, 3]`` of their parts and of the table."""
    records = torch.zeros((*codes.shape, RECORD // 8), dtype=torch.int64, device="cpu")
    records[..., 0], records[..., 1], records[..., 2] = codes, absmax, table
    records.view(torch.float32)[..., 6] = offsets
    return records


def addresses_in(stack: torch.Tensor) -> torch.Tensor:
    """Where the parts of a contiguous stack ``[E, ...]`` begin in memory."""
    size = stack.nbytes // len(stack)
    return stack.data_ptr() + size * torch.arange(len(stack), dtype=torch.int64, device="cpu")
