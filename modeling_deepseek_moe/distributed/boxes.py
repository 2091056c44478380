"""Which part of a sharded tensor a rank holds, as a box of it."""

import math
from typing import NamedTuple

import torch
from torch import distributed


class Box(NamedTuple):
    """A part of a tensor: where it begins, and how far it goes, along every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def meet(self, other: "Box") -> "Box | None":
        """What two boxes of one tensor have in common."""
        begin = tuple(map(max, self.offsets, other.offsets))
        ends = (self.offsets[i] + self.sizes[i] for i in range(len(begin)))
        others = (other.offsets[i] + other.sizes[i] for i in range(len(begin)))
        sizes = tuple(end - start for end, start in zip(map(min, ends, others), begin, strict=True))
        return Box(begin, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """As the indices of ``outer``'s values."""
        starts = (a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def local_boxes(tensor: torch.Tensor) -> list[Box] | None:
    """What this rank holds of a `DTensor`; ``None`` for a tensor that is whole."""
    if not distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__()]
