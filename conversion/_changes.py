"""What an adapter does to one tensor: rows of the tensor go in, and come out as the adapter's model has them.

| change | rows |
|---|---|
| `LowRank` | W + s·B·A |
| with a magnitude m (DoRA) | m / ‖W₀ + s·B·A‖ · (W + s·B·A), row by row, W₀ being the base's weight |
| begun from the weight (PiSSA, OLoRA) | W − P + s·B·A, P being the part of W that training began from and took out of it |
| `Whole` | those that were trained in place of W |
| `Added` | W + s·b, of biases |
| `Tokens` | those of some tokens in place of theirs |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Read = Callable[[], torch.Tensor]
# rows as earlier changes left them, the base's own, and which of the tensor's they are → the new rows
Step = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


def principal(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the largest ``rank`` singular values: PiSSA's beginning (arXiv:2404.02948)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


def orthogonal(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the first ``rank`` columns of a QR decomposition: OLoRA's beginning (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


BEGINNINGS = {"pissa": principal, "olora": orthogonal}


@dataclass(frozen=True)
class LowRank:
    """Of a weight ``[N, K]``: A ``[r, K]``, B ``[N, r]``, s, and perhaps m ``[N]``.

    Attributes:
        beginning: a key of `BEGINNINGS`, of an adapter that took its first matrices out of the weight.
    """

    a: Read
    b: Read
    scaling: float
    magnitude: Read | None = None
    beginning: str | None = None

    def begin(self, whole: Read, dtype: torch.dtype) -> Step:
        """What is done to rows in ``dtype``, in which it is computed; ``whole`` reads the base's weight in fp32."""
        a, b = self.a().to(dtype), self.b().to(dtype) * self.scaling
        if self.beginning is not None:
            # OLoRA takes out s·Q·R, PiSSA divides by s first
            factor = self.scaling if self.beginning == "olora" else 1.0
            first_a, first_b = BEGINNINGS[self.beginning](whole(), len(a))
            a, b = torch.cat((a, first_a.to(dtype))), torch.cat((b, -factor * first_b.to(dtype)), dim=1)
        magnitude = None if self.magnitude is None else self.magnitude().to(dtype)

        def step(tile: torch.Tensor, base: torch.Tensor, rows: slice) -> torch.Tensor:
            delta = b[rows] @ a
            if magnitude is None:
                return delta.add_(tile)
            lengths = torch.linalg.vector_norm(base + delta, dim=1)
            return delta.add_(tile).mul_((magnitude[rows] / lengths).unsqueeze(1))

        return step


@dataclass(frozen=True)
class Whole:
    """``rows``: which of the trained tensor's; they are the new ones."""

    rows: Callable[[slice], torch.Tensor]

    def begin(self, whole: Read, dtype: torch.dtype) -> Step:
        return lambda tile, base, rows: self.rows(rows).to(dtype)


@dataclass(frozen=True)
class Added:
    """Of a bias ``[N]``."""

    values: Read
    scaling: float

    def begin(self, whole: Read, dtype: torch.dtype) -> Step:
        values = self.values().to(dtype) * self.scaling
        return lambda tile, base, rows: tile + values[rows]


@dataclass(frozen=True)
class Tokens:
    """Rows ``values [n, K]`` of the tokens ``indices``, of an embedding ``[vocabulary, K]``."""

    indices: tuple[int, ...]
    values: Read

    def begin(self, whole: Read, dtype: torch.dtype) -> Step:
        values, indices = self.values().to(dtype), torch.tensor(self.indices)

        def step(tile: torch.Tensor, base: torch.Tensor, rows: slice) -> torch.Tensor:
            here = (indices >= rows.start) & (indices < rows.stop)
            return tile.index_copy(0, indices[here] - rows.start, values[here])

        return step


Change = LowRank | Whole | Added | Tokens


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 → the nearest values of ``dtype``.

    torch goes by way of fp32, which rounds twice. There a value that is not exact gets an odd last bit, so that it lies
    on no boundary of the narrower dtypes.
    """
    nearest = values.float()
    if dtype == torch.float32:
        return nearest
    gap = values.abs() - nearest.abs().double()
    bits = nearest.view(torch.int32)
    odd = torch.where((gap != 0) & (bits & 1 == 0), bits + gap.sign().int(), bits)
    return odd.view(torch.float32).to(dtype)
