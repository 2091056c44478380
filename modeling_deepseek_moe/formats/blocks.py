"""Blocks of a weight that share a scale: which of them changed, and new codes and scales for those alone.

A block that changed keeps its scale where that is nearer to what is wanted than a scale of its new largest value: with
its own, values that change by less than half a step stay exactly what they were, with another all are rounded again.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from modeling_deepseek_moe.ops.four_bit import NestedScales, expand, renest

Block = tuple[int, int]


class Format(Protocol):
    """What is asked of a row of the weight formats."""

    @property
    def title(self) -> str: ...

    @property
    def block(self) -> Block: ...

    @property
    def encode_with(self) -> Callable[[torch.Tensor, torch.Tensor, Block], torch.Tensor] | None: ...

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]: ...

    def value_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]: ...

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def dequantize(
        self, codes: torch.Tensor, scales: torch.Tensor | NestedScales, dtype: torch.dtype
    ) -> torch.Tensor: ...


def requantize(
    form: Format, codes: torch.Tensor, scales: torch.Tensor | NestedScales, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | NestedScales, torch.Tensor]:
    """Codes and scales of ``weight``, in which blocks whose values did not change keep their bytes.

    Args:
        codes, scales: of the weight ``[N, K]`` as it was; both stay as they are. Nested scales stay nested, and where a new
            one is beyond its run's, the others of the run move by what rounding them takes.
        weight: ``[N, K]`` in a floating-point dtype, in which it is compared with what the codes stand for.

    Returns:
        Codes, scales, and bool ``[⌈N/rows⌉, ⌈K/columns⌉]``: the blocks that changed.

    Raises:
        ValueError: the weight has another shape, or is not finite.
    """
    shape, block = form.value_shape(codes.shape), form.block
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(f"{form.title}: found {weight.dtype} {list(weight.shape)}, wanted floats {list(shape)}")
    if isinstance(scales, NestedScales):
        before = expand(scales)
        new, values, changed = requantize(form, codes, before, weight)
        if not changed.any():
            return codes, scales, changed
        assert isinstance(values, torch.Tensor)  # as the scales were
        nested = renest(values, scales, changed)
        return new, nested, changed | (expand(nested) != before)
    changed = any_in_blocks(weight != form.dequantize(codes, scales, weight.dtype), block)
    if not changed.any():
        return codes, scales, changed
    width = form.code_shape((1, block[1]))[1]
    if changed.shape[1] > 1 and form.value_shape((1, width))[1] != block[1]:
        raise ValueError(f"{form.title}: found blocks of {list(block)} that share elements of {codes.dtype}")

    def of_codes(mask: torch.Tensor) -> torch.Tensor:
        return mask.repeat_interleave(block[0], 0).repeat_interleave(width, 1)[: codes.shape[0], : codes.shape[1]]

    new, new_scales = form.quantize(weight)
    if form.encode_with is not None:
        kept = form.encode_with(weight, scales, block)
        errors = [
            _squares_in_blocks(weight - form.dequantize(*pair, torch.float32), block)
            for pair in ((kept, scales), (new, new_scales))
        ]
        keeps = errors[0] <= errors[1]
        new, new_scales = _bytes_where(of_codes(keeps), kept, new), _bytes_where(keeps, scales, new_scales)
    return _bytes_where(of_codes(changed), new, codes), _bytes_where(changed, new_scales, scales), changed


def any_in_blocks(mask: torch.Tensor, block: Block) -> torch.Tensor:
    """``[N, K]`` → ``[⌈N/bN⌉, ⌈K/bK⌉]``: whether any element of a block is set."""
    return _in_blocks(mask, block).any(3).any(1)


def _squares_in_blocks(values: torch.Tensor, block: Block) -> torch.Tensor:
    return _in_blocks(values.square(), block).sum(3).sum(1)


def _in_blocks(values: torch.Tensor, block: Block) -> torch.Tensor:
    """``[⌈N/bN⌉, bN, ⌈K/bK⌉, bK]``, zeros beyond the ragged edges."""
    n, k = values.shape
    padded = torch.nn.functional.pad(values, (0, -k % block[1], 0, -n % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def _bytes_where(mask: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`torch.where` for dtypes that it does not know, and to the bit for those that it does."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[old.dtype.itemsize]
    return torch.where(mask, new.view(raw), old.view(raw)).view(old.dtype)
