"""How far what a conversion wrote is from what it was to be, part by part of the model."""

import threading
from dataclasses import dataclass

import torch

from modeling_deepseek_moe.formats import WeightFormat

MUCH = 0.7  # of a change: half of its square and more


@dataclass
class Tally:
    """Of one weight: the tensors that it is, blocks, and sums of squares of what was wanted, of the change that was wanted, and of the rounding."""

    part: str
    tensors: int = 1
    altered: bool = False
    blocks: int = 0
    changed: int = 0
    wanted: float = 0.0
    change: float = 0.0
    error: float = 0.0

    def add(
        self,
        wanted: torch.Tensor,
        before: torch.Tensor,
        written: torch.Tensor,
        changed: torch.Tensor | None = None,
        form: WeightFormat | None = None,
    ) -> None:
        """Some rows; of codes, those of ``form``, only the blocks that changed."""
        self.altered |= not torch.equal(before, written)
        if changed is not None and form is not None:
            self.blocks += changed.numel()
            self.changed += int(changed.sum())
            if not changed.all():
                own = form.values_of(changed, tuple(wanted.shape))
                wanted, before, written = (rows[own] for rows in (wanted, before, written))
        self.wanted += _squares(wanted)
        self.change += _squares(wanted - before)
        self.error += _squares(wanted - written)


def _squares(values: torch.Tensor) -> float:
    return torch.linalg.vector_norm(values).item() ** 2


class Report:
    """Tallies by tensor; safe to fill from several threads. A tensor that is made again counts once.

    Attributes:
        untouched: tensors that are copied.
        decoded: weights whose values are what codes stood for, and no more.
    """

    def __init__(self):
        self.untouched = self.decoded = 0
        self._lock = threading.Lock()
        self._tallies: dict[str, Tally] = {}

    def keep(self, name: str, tally: Tally) -> None:
        with self._lock:
            self._tallies[name] = tally

    def lines(self) -> list[str]:
        """Of each part: how many tensors and blocks changed, and the relative errors."""
        parts: dict[str, list[Tally]] = {}
        kept = self.untouched
        for tally in self._tallies.values():
            if tally.altered or tally.change:
                parts.setdefault(tally.part, []).append(tally)
            if not tally.altered:
                kept += tally.tensors
        decoded = [f"decoded: weights {self.decoded:,}"] if self.decoded else []
        return [*(_line(part, parts[part]) for part in sorted(parts)), *decoded, f"as they were: tensors {kept:,}"]


def _line(part: str, tallies: list[Tally]) -> str:
    wanted, change, error = (sum(getattr(tally, of) for tally in tallies) for of in ("wanted", "change", "error"))
    blocks, changed = (sum(getattr(tally, of) for tally in tallies) for of in ("blocks", "changed"))
    of_weights, of_change = ((error / whole) ** 0.5 if whole else 0.0 for whole in (wanted, change))
    altered = sum(tally.altered for tally in tallies)
    tensors = f"{altered:,}" if altered == len(tallies) else f"{altered:,} of {len(tallies):,}"
    lost = "" if of_change < MUCH else ": most of it; floating-point weights would keep it (convert the base first)"
    return (
        f"{part}: tensors changed {tensors}{f', blocks {changed:,} of {blocks:,}' if blocks else ''}; rounding took "
        f"{of_weights:.2g} of the weights, {of_change:.2g} of the change{lost}"
    )
