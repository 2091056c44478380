"""How far weights are from those that they were made of, by the part of the model that they belong to."""

import math
import threading
from collections.abc import Iterator

import torch


class WeightErrors:
    """Sums of squares by part, of the weights and of what they are off by. Safe to add to from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._sums: dict[str, list[float]] = {}

    def add(self, part: str, values: torch.Tensor, made: torch.Tensor) -> None:
        """
        Args:
            values, made: the same range of a weight, as it was and as it is.
        """
        values, made = values.double(), made.double()
        off, own = (made - values).square().sum().item(), values.square().sum().item()
        with self._lock:
            sums = self._sums.setdefault(part, [0.0, 0.0])
            sums[0] += off
            sums[1] += own

    def relative(self) -> dict[str, float]:
        """‖W' - W‖ / ‖W‖ of each part, and of ``all``; 0 for what is the same, zeros too."""
        whole = [sum(sums[i] for sums in self._sums.values()) for i in range(2)]
        return {part: _ratio(*sums) for part, sums in (*self._sums.items(), ("all", whole))}

    def lines(self) -> Iterator[str]:
        for part, error in self.relative().items():
            yield f"{part:<15} ‖W' - W‖ / ‖W‖ = {error:.4f}"


def _ratio(off: float, own: float) -> float:
    return math.sqrt(off / own) if own else math.inf if off else 0.0
