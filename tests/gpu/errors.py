"""How wrong a kernel may be: at most twice what plain torch is in the same dtype, both against fp64."""

import torch

LIMIT = 2.0
FLOOR = 2.4e-7  # two units of fp32: some CPUs' products are summed in an order that errs less than one


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def check(found: torch.Tensor, reference: torch.Tensor, wanted: torch.Tensor) -> None:
    """``wanted`` is fp64."""
    error, allowed = relative(found, wanted), max(FLOOR, LIMIT * relative(reference, wanted))
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def poison_empty(monkeypatch) -> None:
    """What no kernel has written is NaN."""
    empty = torch.empty

    def poisoned(*arguments, **named):
        made = empty(*arguments, **named)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with NaN on all sides of it in memory, so that what is read past its ends shows."""
    room = torch.full((tensor.numel() + 512,), float("nan"), dtype=tensor.dtype)
    inside = room[256 : 256 + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside
