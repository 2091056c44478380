"""What a draft has yet to read: the columns of the steps since it last drafted, of which rows may have kept unlike numbers."""

from collections import deque

import torch


class Pending:
    """Tensors ``[B, w, ...]`` of each step, and which of their columns ``[B, w]`` are a row's own.

    Args:
        most: steps, of which the last ones are held; ``None``: any number.
    """

    def __init__(self, most: int | None = None):
        self._steps: deque[tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]] = deque(maxlen=most)

    def add(self, own: torch.Tensor | None, *columns: torch.Tensor) -> bool:
        """Add a step's; ``own`` is ``None`` where all are. Returns whether an earlier step's had to go for it."""
        is_full = len(self._steps) == self._steps.maxlen
        self._steps.append((own, columns))
        return is_full

    def take(self) -> tuple[torch.Tensor, ...]:
        """How many columns each row has, ``[B]``, and the tensors of all steps, in which a row's own columns come first."""
        masks, steps = zip(*self._steps, strict=True)
        self._steps.clear()
        joined = [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*steps, strict=True)]
        batch, width = joined[0].shape[:2]
        if all(mask is None for mask in masks):
            return (torch.full((batch,), width, device=joined[0].device), *joined)
        widths = [columns[0].shape[1] for columns in steps]
        own = torch.cat(
            [
                joined[0].new_ones(batch, w, dtype=torch.bool) if mask is None else mask
                for mask, w in zip(masks, widths, strict=True)
            ],
            dim=1,
        )
        counts = own.sum(1)
        order = (~own).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
        rows = torch.arange(batch, device=own.device)[:, None]
        return (counts, *(tensor[rows, order] for tensor in joined))


def first_columns(counts: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """``[B, width]``: the first ``counts [B]`` of each row; ``None`` for all of all."""
    return None if counts is None else torch.arange(width, device=counts.device) < counts[:, None]
