"""What a weight format is: a row of the table in `formats`, and what follows from its fields."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from modeling_deepseek_moe.formats import blocks
from modeling_deepseek_moe.formats.announcements import BLOCK, SKIPPED
from modeling_deepseek_moe.ops import four_bit
from modeling_deepseek_moe.ops.quantized_linear import quantized_linear

Block = tuple[int, int]
Scales = torch.Tensor | four_bit.NestedScales


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a weight.

    Attributes:
        name: as ``save_pretrained(quantize=...)`` and reports call it.
        method, fields: ``quant_method`` of the release's ``quantization_config``, and what else it says there.
        implied: what it does not say, and a config may.
        code_dtype, bits: how codes lie on the disk and in memory, ``bits`` of a value's own.
        block: rows and columns that share a scale, ragged at the edges; ``weight_block_size`` of a config replaces it.
        scale_dtype, scale_suffix: one scale a block: of the scales ``[⌈N/rows⌉, ⌈K/columns⌉]``, whose name is the weight's with the suffix.
        encode: a floating-point weight and the block → codes and scales.
        decode: codes, scales, a dtype and the block → the weight, rounded once.
        kernel: the name of the CPU engine's kernels for it, ``"block_fp8"``; ``None``: it has none.
        linear: ``x, codes, scales, bias, block → x · Wᵀ + bias`` for a format with kernels; ``None``: by `decode`.
        renew: codes, scales and a weight → as `requantize`, where what shares a scale is no block of rows and columns.
        find_scales: the scales of `encode` alone, where they are had for less.
        encode_with: a weight, scales and the block → the nearest codes; ``None`` where scales are never given.
        nan_code: codes that are no number have these bits, sign apart; ``None`` where each code is one.
        code_suffix: of the codes on the disk, whose name is the weight's with it; in memory they have the weight's name.
        others: the weight's further tensors on the disk by suffix, each made of the weight's shape.
        in_a_column: the codes are ``[bytes, 1]`` on the disk and the scales ``[scales]``, row by row.
        whole_groups: weights are those whose rows are a whole number of groups; others stay as they are.
        announce: the fields, the block and the names of modules without codes → ``quantization_config``, where it is
            more than the fields and the block.
        foreign: transformers' own quantiser of that method loads it, this package's does not.
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
    linear: Callable[..., torch.Tensor] | None = None
    renew: Callable[..., tuple[torch.Tensor, Scales, torch.Tensor]] | None = None
    find_scales: Callable[[torch.Tensor, Block], torch.Tensor] | None = None
    encode_with: Callable[[torch.Tensor, torch.Tensor, Block], torch.Tensor] | None = None
    nan_code: int | None = None
    code_suffix: str = ""
    others: Mapping[str, Callable[[tuple[int, ...]], torch.Tensor]] = field(default_factory=dict)
    in_a_column: bool = False
    whole_groups: bool = False
    announce: Callable[[Mapping, Block, Sequence[str]], dict] | None = None
    foreign: bool = False

    def __post_init__(self):
        if not self.scale_suffix or self.scale_suffix == self.code_suffix:
            raise ValueError(f"{self.name}: scale_suffix: found {self.scale_suffix!r}, wanted one of its own")

    @property
    def title(self) -> str:
        """The name in a sentence: ``FP8``, ``FP8 UE8M0``."""
        return self.name.replace("_", " ").upper()

    @property
    def to_floats(self) -> str:
        """How a user comes to a loaded model in floating point, in a sentence."""
        return (
            "call model.dequantize()" if self.foreign else "load the model with FineGrainedFP8Config(dequantize=True)"
        )

    @property
    def converter(self) -> str:
        """What writes a folder of it in floating point, in a sentence: one command, which is called after the first format."""
        return "`deepseek-moe convert fp8-to-bf16`" + ("" if self.bits == 8 else f", which takes {self.title} too")

    @property
    def scale_parameter(self) -> str:
        """What follows a weight's name in that of the parameter with its scales, where a dot would end a module's name."""
        return self.scale_suffix.replace(".", "_")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can have it."""
        return not self.whole_groups or shape[-1] % self.block[1] == 0

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the codes of a weight ``[..., N, K]``: several share an element where ``bits`` are fewer than its own."""
        return *shape[:-1], math.ceil(shape[-1] * self.bits / (8 * self.code_dtype.itemsize))

    def value_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of `code_shape`, where codes fill their elements."""
        return *shape[:-1], shape[-1] * 8 * self.code_dtype.itemsize // self.bits

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of a weight ``[..., N, K]``."""
        return *shape[:-2], math.ceil(shape[-2] / self.block[0]), math.ceil(shape[-1] / self.block[1])

    def nbytes(self, values: int, scales: int, weights: int = 0) -> int:
        """On the disk, of ``values`` with ``scales``, in whole codes, and of the other tensors of a number of ``weights``."""
        others = sum(make((1, 1)).nbytes for make in self.others.values()) if weights else 0
        return math.ceil(values * self.bits / 8) + scales * self.scale_dtype.itemsize + weights * others

    def on_disk(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the codes and of the scales of the weight ``name [N, K]``, in this order, by their names in a file."""
        codes, scales = self.code_shape(shape), self.scale_shape(shape)
        if self.in_a_column:
            codes, scales = (math.prod(codes), 1), (math.prod(scales),)
        return {
            name + self.code_suffix: (self.code_dtype, codes),
            name + self.scale_suffix: (self.scale_dtype, scales),
        }

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a floating-point matrix.

        Raises:
            ValueError: it is not finite, or no matrix.
        """
        return self.encode(weight, self.block)

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales of `quantize` alone."""
        return self.encode(weight, self.block)[1] if self.find_scales is None else self.find_scales(weight, self.block)

    def dequantize(self, codes: torch.Tensor, scales: Scales, dtype: torch.dtype) -> torch.Tensor:
        """The weight in ``dtype``, as a fresh tensor."""
        return self.decode(codes, scales, dtype, self.block)

    def requantize(
        self, codes: torch.Tensor, scales: Scales, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Scales, torch.Tensor]:
        """`blocks.requantize`: codes and scales of ``weight``, and the blocks that changed; all others keep their bytes."""
        if self.renew is not None:
            return self.renew(codes, scales, weight)
        return blocks.requantize(self, codes, scales, weight)

    def values_of(self, changed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Bool ``[N, K]`` of what `requantize` says of blocks: ``[rows, columns]`` of them, or ``[blocks]`` through the rows."""
        if changed.ndim == 1:
            return changed.repeat_interleave(self.block[1])[: math.prod(shape)].view(shape)
        rows, columns = (min(own, size) for own, size in zip(self.block, shape, strict=True))
        return changed.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]

    def multiply(
        self, x: torch.Tensor, codes: torch.Tensor, scales: Scales, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [..., K] · Wᵀ + bias → [..., N]`` in the dtype of ``x``, differentiable in ``x`` and ``bias``."""
        if self.linear is not None:
            return self.linear(x, codes, scales, bias, self.block)
        plain = four_bit.expand(scales) if isinstance(scales, four_bit.NestedScales) else scales
        return quantized_linear(x, codes, plain, bias, self.block[0], partial(self.decode, block=self.block))

    def quantization_config(self, ignored: Sequence[str] = (), with_head: bool = False) -> dict:
        """What a release in this format says of itself.

        Args:
            ignored: the modules without codes, names or ``re:`` patterns.
            with_head: whether the head is codes too, which fields that list no such modules have to say.
        """
        if self.announce is not None:
            return self.announce(self.fields, self.block, ignored)
        skipped = {SKIPPED: []} if with_head else {}
        return {**self.fields, **skipped, "quant_method": self.method, BLOCK: list(self.block)}

    def _value(self, field: str) -> object:
        return self.fields.get(field, self.implied.get(field))

    def scale_rows(self, rows: slice) -> slice:
        """The rows of scales that belong to a range of rows of a weight."""
        return slice(rows.start // self.block[0], -(-rows.stop // self.block[0]))

    def with_other(self, suffix: str, dtype: torch.dtype) -> "WeightFormat":
        """The row of a release that has one of the other tensors in another dtype."""
        return replace(self, others={**self.others, suffix: partial(_in_dtype, self.others[suffix], dtype)})

    def in_blocks_of(self, block: Block) -> "WeightFormat":
        return replace(self, block=(block[0], block[1]))


def _in_dtype(
    make: Callable[[tuple[int, ...]], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    return make(shape).to(dtype)
