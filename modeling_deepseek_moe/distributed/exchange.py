"""Tensors that several ranks hold in parts, brought to the one that needs them a few megabytes at a time.

All ranks go through one list of wanted boxes in one order, and of each box through its ranges of rows: who holds rows of another's
box sends them, who wants them receives. All meet in the order of the list, so none waits for ever; and
a rank that fails goes on to the end of the list without keeping anything, so that the others are not left waiting.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from modeling_deepseek_moe.distributed.boxes import Box, local_boxes

PIECE_BYTES = 16 << 20


class Wanted(NamedTuple):
    """A box of a tensor that one rank wants."""

    tensor: str
    box: Box
    owner: int


class Holdings:
    """Which rank holds which box of each sharded tensor. Made on all ranks together.

    Args:
        tensors: this rank's, some of them `DTensor`; the others are whole on every rank.

    Raises:
        ValueError: on all ranks, where they have other tensors than rank 0.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        own = {name: local_boxes(tensor) or [] for name, tensor in tensors.items()}
        everyone: list[dict[str, list[Box]]] = [{} for _ in range(self.ranks)]
        distributed.all_gather_object(everyone, own)
        for rank, theirs in enumerate(everyone):
            if other := sorted(theirs.keys() ^ everyone[0].keys()):
                raise ValueError(f"rank {rank}: tensor {other[0]}: found on this rank or on rank 0, wanted on both")
        self.held = {name: _without_copies([theirs[name] for theirs in everyone]) for name in own}

    def is_sharded(self, name: str) -> bool:
        return bool(self.held[name])

    def weights_of(self, name: str, box: Box) -> list[int]:
        """How many values of a box each rank holds."""
        weights = [0] * self.ranks
        for rank, held in self.held[name]:
            common = held.meet(box)
            weights[rank] += common.numel if common else 0
        return weights

    def local(self, name: str, box: Box) -> torch.Tensor:
        """A box that this rank holds."""
        tensor = self.tensors[name]
        if not isinstance(tensor, DTensor):
            return tensor.detach()[box.within(Box((0,) * tensor.ndim, tuple(tensor.shape)))]
        outer = next(held for held in local_boxes(tensor) or () if held.meet(box) == box)
        return tensor.detach().to_local()[box.within(outer)]


def _without_copies(boxes: list[list[Box]]) -> list[tuple[int, Box]]:
    """Each box once, with the first rank that holds it."""
    seen: dict[Box, int] = {}
    for rank, held in enumerate(boxes):
        for box in held:
            if box.numel:
                seen.setdefault(box, rank)
    return [(rank, box) for box, rank in seen.items()]


class Exchange:
    """The list of all ranks' boxes, gone through piece by piece.

    Args:
        wanted: the same on all ranks.
    """

    def __init__(self, holdings: Holdings, wanted: list[Wanted]):
        self.holdings, self.wanted = holdings, wanted
        self._at = 0
        self._pieces: Iterator[torch.Tensor | None] | None = None

    def receive(self, number: int) -> Iterator[torch.Tensor]:
        """The rows of this rank's box ``number`` on the CPU, in ranges; what lies before it in the list is sent first."""
        while self._at < number:
            self._step()
        while self._at == number:
            piece = self._step()
            if piece is not None:
                yield piece

    def finish(self) -> None:
        """Go on to the end of the list: send what others want, and keep nothing."""
        while self._at < len(self.wanted):
            self._step()

    def _step(self) -> torch.Tensor | None:
        """One piece, or, where a box is done, nothing."""
        if self._pieces is None:
            self._pieces = self._exchange(self.wanted[self._at])
        try:
            return next(self._pieces)
        except StopIteration:
            self._pieces, self._at = None, self._at + 1
            return None

    def _exchange(self, wanted: Wanted) -> Iterator[torch.Tensor | None]:
        holdings, like = self.holdings, self.holdings.tensors[wanted.tensor]
        is_mine = wanted.owner == holdings.rank
        device = like.to_local().device if isinstance(like, DTensor) else like.device
        for piece in row_ranges(wanted.box, like.dtype.itemsize):
            if not holdings.is_sharded(wanted.tensor):
                yield holdings.local(wanted.tensor, piece).cpu() if is_mine else None
                continue
            out = torch.empty(piece.sizes, dtype=like.dtype) if is_mine else None
            for rank, held in holdings.held[wanted.tensor]:
                common = held.meet(piece)
                if common is None:
                    continue
                if is_mine and rank == wanted.owner:
                    out[common.within(piece)] = holdings.local(wanted.tensor, common).cpu()
                elif is_mine:
                    # as bytes: not every backend sends every dtype
                    part = torch.empty(common.sizes, dtype=like.dtype, device=device)
                    distributed.recv(part.view(-1).view(torch.uint8), src=rank)
                    out[common.within(piece)] = part.cpu()
                elif rank == holdings.rank:
                    part = holdings.local(wanted.tensor, common).contiguous()
                    distributed.send(part.view(-1).view(torch.uint8), dst=wanted.owner)
            yield out


def row_ranges(box: Box, itemsize: int) -> Iterator[Box]:
    """A box in ranges along its first dimension of more than one, each of at most a few megabytes."""
    at = next((dim for dim, size in enumerate(box.sizes) if size > 1), len(box.sizes) - 1)
    if at < 0:
        yield box
        return
    width = max(1, math.prod(box.sizes[at + 1 :]) * itemsize)
    step = max(1, PIECE_BYTES // width)
    for first in range(0, box.sizes[at], step):
        offsets = (*box.offsets[:at], box.offsets[at] + first, *box.offsets[at + 1 :])
        yield Box(offsets, (*box.sizes[:at], min(step, box.sizes[at] - first), *box.sizes[at + 1 :]))
