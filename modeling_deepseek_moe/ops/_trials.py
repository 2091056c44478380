"""Whether a library of others computes what this package does, and faster, on this very card: tried once for each shape.

At an operation's first use outside of a CUDA graph the library runs on small random operands, next to this package's definition,
and then on the operands that are there, in turns with this package's kernels, by the card's own clock. One line in the log
says what was taken, with the times, or why not. Nothing is taken by the clock where kernels have to be the same ones each time.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import logging

from modeling_deepseek_moe.ops import _libraries
from modeling_deepseek_moe.ops._dispatch import insists_on
from modeling_deepseek_moe.ops._libraries import LIBRARIES, installed, told
from modeling_deepseek_moe.ops._memory import exhausted

T = TypeVar("T")
logger = logging.get_logger(__name__)
TURNS = 7
OF_ATTENTION = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # tolerances: weights are rounded before they meet values
TRIES = 3  # that may end for want of memory, before it is a verdict
SAME_KERNELS = "is not taken by the clock where torch.use_deterministic_algorithms wants the same kernels in each run"
SAME_SUMS = (
    "is not taken by the clock in a job of several processes: one might take it and another not, and their sums differ"
)


class Trial(NamedTuple):
    """
    Args:
        found, wanted: make what the library, and the definition, compute of the same small operands: a result, and its gradients.
        tolerance: of a difference's norm, relative to the wanted one's; each tensor by itself.
        theirs, own: compute the operation on the operands in use, by the library and by this package.
    """

    found: Callable[[], list[torch.Tensor]]
    wanted: Callable[[], list[torch.Tensor]]
    tolerance: float
    theirs: Callable[[], object]
    own: Callable[[], object]


class Verdict(NamedTuple):
    """``refusal``: why the library cannot be used; else the microseconds of both."""

    refusal: str | None
    theirs: float = 0.0
    own: float = 0.0

    @property
    def slower(self) -> str | None:
        if self.refusal is None and self.theirs >= self.own:
            return f"took {self.theirs:.0f} µs, this package's kernels {self.own:.0f}"
        return None


class Trials:
    """All verdicts of this process, by library, operation, device and shape class."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple, Verdict] = {}
        self._exhausted: Counter[tuple] = Counter()
        self._barred: set[tuple[str, str]] = set()

    def reason(
        self,
        library: str,
        operation: str,
        tensor: torch.Tensor,
        shape: tuple,
        make: Callable[[], Trial],
    ) -> str | None:
        """Why the library is not taken; ``None`` if it is. Where it was asked for by name it need not be faster.

        Args:
            tensor: one of the operands; its device and dtype count.
            shape: what a verdict holds for, next to them.
            make: the trial, if there was none for it yet.
        """
        insisted = insists_on(library)
        bar = None if insisted else barred()
        if bar is not None:
            if (library, bar) not in self._barred:
                self._barred.add((library, bar))
                logger.info(f"{_named(library)} {bar}")
            return bar
        key = library, operation, str(tensor.device), tensor.dtype, *shape
        verdict = self._verdicts.get(key)
        if verdict is None:
            if isinstance(tensor, FakeTensor):
                return "is tried on values, found tensors that have shapes alone"
            if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "was not tried before a CUDA graph was captured"
            try:
                verdict = judge(make, tensor.device)
            except Exception as error:
                if exhausted(error) is None:
                    raise
                verdict = Verdict("found no memory left to be tried with")
                self._exhausted[key] += 1
                # with gradients a checkpoint may compute the same again, and has to take the same
                if self._exhausted[key] < TRIES and not torch.is_grad_enabled():
                    return verdict.refusal
            self._verdicts[key] = verdict
            self._tell(library, operation, key[3:], tensor.device, verdict)
        return verdict.refusal or (None if insisted else verdict.slower)

    @staticmethod
    def _tell(library: str, operation: str, shape: tuple, device: torch.device, verdict: Verdict) -> None:
        name, reason = _named(library), verdict.refusal or verdict.slower
        if reason is None:
            taken = f"{name}: {verdict.theirs:.0f} µs, this package's kernels {verdict.own:.0f}"
        else:
            taken = f"this package's kernels: {name} {reason}"
        logger.info(f"{operation} {', '.join(map(str, shape))} on {device}: {taken}")


def _named(library: str) -> str:
    row = LIBRARIES[library]
    return f"{row.name} ({installed(row.packages)})"


def barred() -> str | None:
    """Why nothing is taken by the clock, which may say one thing today, another tomorrow or elsewhere; ``None`` if it may."""
    if torch.are_deterministic_algorithms_enabled():
        return SAME_KERNELS
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return SAME_SUMS
    return None


@cache
def trials() -> Trials:
    return Trials()


def forget() -> None:
    """All verdicts, and what is known of the libraries: what is installed, and by which calls."""
    trials.cache_clear()
    _libraries.forget()


class LibraryError(RuntimeError):
    """What a library raised, as a trial's verdict."""


def _of_others(call: Callable[[], T]) -> T:
    """What a library computes; whatever its code raises becomes a `LibraryError`, but for memory that ends."""
    try:
        return call()
    except Exception as error:
        if exhausted(error):
            raise
        raise LibraryError(f"raised {told(error)}") from error


def judge(make: Callable[[], Trial], device: torch.device) -> Verdict:
    """Compare, then time; what a library raises is its refusal, what this package raises is raised."""
    # what a trial saves for gradients is not the model's: a checkpoint would count it, and miss it as it computes again
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        trial = make()
        wanted = trial.wanted()
        try:
            difference = _of_others(lambda: largest_difference(trial.found(), wanted))
            if not difference <= trial.tolerance:
                return Verdict(f"differs by {difference:.2g} of the norm, allowed is {trial.tolerance:.2g}")
            return Verdict(None, *times(device, partial(_of_others, trial.theirs), trial.own))
        except LibraryError as error:  # it is told, and this package's kernels run
            return Verdict(str(error))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def random(*shape: int, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Normal values of the dtype and on the device of ``like``, the same ones each time; no generator in use is touched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def step(function: Callable[..., torch.Tensor], tensors, needed: tuple[bool, ...]) -> list[torch.Tensor]:
    """What a function makes of tensors, and the gradients of its sum with respect to those that are ``needed``."""
    with torch.set_grad_enabled(any(needed)):
        leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(tensors, needed, strict=True)]
        found = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [found.detach(), *(torch.autograd.grad(found, wanted, torch.ones_like(found)) if wanted else ())]


def largest_difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """`relative_difference` of each two, the worst."""
    return max(relative_difference(*pair) for pair in zip(found, wanted, strict=True))


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``‖found - wanted‖ / ‖wanted‖``; infinite where shapes differ or something is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    wanted = wanted.double()
    difference = float((found.double() - wanted).norm() / wanted.norm())
    return difference if difference == difference else float("inf")


def times(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    """Microseconds of each on a card: the median of several, taken in turns after two that warm up.

    One is started after the other without a wait, as a model's kernels are: while the card still computes, starting them is not seen.
    """
    with torch.cuda.device(device):
        for call in calls * 2:
            call()
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for call in calls * TURNS:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        events[-1][1].synchronize()
    taken = [1000 * start.elapsed_time(end) for start, end in events]
    return [statistics.median(taken[place :: len(calls)]) for place in range(len(calls))]
