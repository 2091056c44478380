"""The weight formats: how a weight ``[N, K]`` is stored as codes with a scale for each block of them.

A format is a row of `FORMATS`. Layers, experts, streaming, saving, conversion and planning read the row and know no
format by name; what the CPU engine has kernels for it runs, and the rest is computed as `ops.quantized_linear` defines it.

| row | codes | block | scales | rule |
|---|---|---|---|---|
| ``fp8`` | E4M3 | 128 × 128 | fp32 | amax / 448 |
| ``fp8_ue8m0`` | E4M3 | 128 × 128 | fp32, powers of two | 2^⌈log2(amax / 448)⌉ |
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.ops.quantized_linear import quantized_linear

Block = tuple[int, int]
MAX_BLOCK = 1 << 20


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a weight.

    Attributes:
        name: as ``save_pretrained(quantize=...)`` and reports call it.
        method, fields: ``quant_method`` of the release's ``quantization_config``, and what else it says there.
        implied: what it does not say, and a config may.
        code_dtype, bits: how codes lie on the disk and in memory, ``bits`` of a value's own.
        block: rows and columns that share a scale, ragged at the edges; ``weight_block_size`` of a config replaces it.
        scale_dtype, scale_suffix: one scale a block and no other tensor, and no dot in the suffix: of the scales ``[⌈N/rows⌉, ⌈K/columns⌉]``, whose name is the weight's with the suffix.
        encode: a floating-point weight and the block → codes and scales.
        decode: codes, scales, a dtype and the block → the weight, rounded once.
        kernel: the name of the CPU engine's kernels for it, ``"block_fp8"``; ``None``: it has none.
        linear: ``x, codes, scales, bias, block → x · Wᵀ + bias`` for a format with kernels; ``None``: by `decode`.
        find_scales: the scales of `encode` alone, where they are had for less.
        encode_with: a weight, scales and the block → the nearest codes; ``None`` where scales are never given.
        nan_code: codes that are no number have these bits, sign apart; ``None`` where each code is one.
    """

    name: str
    method: str
    fields: Mapping[str, object]
    implied: Mapping[str, object]
    code_dtype: torch.dtype
    bits: int
    block: Block
    scale_dtype: torch.dtype
    scale_suffix: str
    encode: Callable[[torch.Tensor, Block], tuple[torch.Tensor, torch.Tensor]]
    decode: Callable[..., torch.Tensor]  # and, as a keyword too, the block
    kernel: str | None = None
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Block], torch.Tensor] | None = (
        None
    )
    find_scales: Callable[[torch.Tensor, Block], torch.Tensor] | None = None
    encode_with: Callable[[torch.Tensor, torch.Tensor, Block], torch.Tensor] | None = None
    nan_code: int | None = None

    def __post_init__(self):
        if not self.scale_suffix or "." in self.scale_suffix:  # it is part of a parameter's name
            raise ValueError(f"{self.name}: scale_suffix: found {self.scale_suffix!r}, wanted one without a dot")

    @property
    def title(self) -> str:
        """The name in a sentence: ``FP8``, ``FP8 UE8M0``."""
        return self.name.replace("_", " ").upper()

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the codes of a weight ``[..., N, K]``: several share an element where ``bits`` are fewer than its own."""
        return *shape[:-1], math.ceil(shape[-1] * self.bits / (8 * self.code_dtype.itemsize))

    def value_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of `code_shape`, where codes fill their elements."""
        return *shape[:-1], shape[-1] * 8 * self.code_dtype.itemsize // self.bits

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of a weight ``[..., N, K]``."""
        return *shape[:-2], math.ceil(shape[-2] / self.block[0]), math.ceil(shape[-1] / self.block[1])

    def nbytes(self, values: int, scales: int) -> int:
        """Of ``values`` with ``scales``, in whole codes."""
        return math.ceil(values * self.bits / 8) + scales * self.scale_dtype.itemsize

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a floating-point matrix.

        Raises:
            ValueError: it is not finite, or no matrix.
        """
        return self.encode(weight, self.block)

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales of `quantize` alone."""
        return self.encode(weight, self.block)[1] if self.find_scales is None else self.find_scales(weight, self.block)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight in ``dtype``, as a fresh tensor."""
        return self.decode(codes, scales, dtype, self.block)

    def multiply(
        self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [..., K] · Wᵀ + bias → [..., N]`` in the dtype of ``x``, differentiable in ``x`` and ``bias``."""
        if self.linear is not None:
            return self.linear(x, codes, scales, bias, self.block)
        return quantized_linear(x, codes, scales, bias, self.block[0], partial(self.decode, block=self.block))

    def quantization_config(self) -> dict:
        """What a release in this format says of itself."""
        return {**self.fields, "quant_method": self.method, "weight_block_size": list(self.block)}

    def _value(self, field: str) -> object:
        return self.fields.get(field, self.implied.get(field))

    def scale_rows(self, rows: slice) -> slice:
        """The rows of scales that belong to a range of rows of a weight."""
        return slice(rows.start // self.block[0], -(-rows.stop // self.block[0]))

    def in_blocks_of(self, block: Block) -> "WeightFormat":
        return replace(self, block=(block[0], block[1]))


FP8 = WeightFormat(
    name="fp8",
    method="fp8",
    fields={"activation_scheme": "dynamic", "fmt": "e4m3"},
    implied={"expert_dtype": "fp8"},
    code_dtype=torch.float8_e4m3fn,
    bits=8,
    block=block_fp8.BLOCK,
    scale_dtype=torch.float32,
    scale_suffix="_scale_inv",
    encode=block_fp8.quantize,
    decode=block_fp8.dequantize,
    kernel="block_fp8",
    linear=block_fp8.linear,
    find_scales=block_fp8.scales,
    encode_with=block_fp8.quantize_with,
    nan_code=0x7F,
)
FORMATS = (
    FP8,
    replace(
        FP8,
        name="fp8_ue8m0",
        fields={**FP8.fields, "scale_fmt": "ue8m0"},
        encode=partial(block_fp8.quantize, power_of_two=True),
        find_scales=partial(block_fp8.scales, power_of_two=True),
    ),
)


def by_name(name: str) -> WeightFormat:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    for row in FORMATS:
        if row.name == name:
            return row
    raise ValueError(f"{name!r} is not supported, wanted {' or '.join(repr(row.name) for row in FORMATS)}")


def methods() -> tuple[str, ...]:
    """Every ``quant_method`` of the table."""
    return tuple(dict.fromkeys(row.method for row in FORMATS))


# A config's memory of the row that its weights were dequantised from, where that is not the first of its method.
RELEASED = "released_weight_format"


def memory(row: WeightFormat) -> dict[str, str]:
    """What a config that loses its ``quantization_config`` keeps of it, so that weights go back into the row they came from."""
    first = next(other for other in FORMATS if other.method == row.method)
    return {} if row.name == first.name else {RELEASED: row.name}


def remembered(name: object, wanted: WeightFormat) -> WeightFormat:
    """The row called ``name``, a config's memory, if it has ``wanted``'s method; else ``wanted``."""
    return next((row for row in FORMATS if row.name == name and row.method == wanted.method), wanted)


def of_config(fields: Mapping | None) -> WeightFormat | None:
    """The format that a release's ``quantization_config`` announces, in its blocks; ``None`` if there is none.

    Raises:
        ValueError: no row has it; names the field, what was found and what is supported.
    """
    if not fields:
        return None
    rows = [row for row in FORMATS if row.method == fields.get("quant_method")]
    if not rows:
        known = " or ".join(repr(method) for method in sorted(methods()))
        raise ValueError(
            f"quantization_config: quant_method={str(fields.get('quant_method'))[:80]!r} is not supported, only {known}"
        )
    for field in dict.fromkeys(field for row in rows for field in (*row.fields, *row.implied)):
        supported = [row._value(field) for row in rows]
        found = supported[0] if fields.get(field) is None else fields[field]
        rows = [row for row, value in zip(rows, supported, strict=True) if value == found]
        if not rows:
            known = " or ".join(repr(value) for value in dict.fromkeys(supported) if value is not None)
            raise ValueError(f"quantization_config: {field}={found!r} is not supported, only {known}")
    block = fields.get("weight_block_size") or rows[0].block
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(size) is int and 0 < size <= MAX_BLOCK for size in block)
    ):
        raise ValueError(
            f"quantization_config: weight_block_size={str(block)[:80]!r} is not supported, wanted two sizes from 1 to {MAX_BLOCK}"
        )
    return rows[0].in_blocks_of((block[0], block[1]))


def of_codes(dtype: torch.dtype) -> Iterator[WeightFormat]:
    """The rows whose codes have this dtype."""
    return (row for row in FORMATS if row.code_dtype == dtype)


def split_scale(name: str) -> tuple[str, str | None]:
    """``…weight_scale_inv`` → ``…weight`` and the suffix; a name that is no scale's as it is, with ``None``."""
    for row in FORMATS:
        if name.endswith(row.scale_suffix):
            return name.removesuffix(row.scale_suffix), row.scale_suffix
    return name, None
