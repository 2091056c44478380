"""Ranks meet before they wait for one another: a failure on one of them, or a difference, is an error on all, and named.

A rank that fails on its own would leave the others waiting in their next collective operation, for as long as the process
group's time-out is. So each tells how far it came, at points that all of them pass.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from transformers.distributed.utils import get_distributed_backend

WAIT = timedelta(minutes=10)  # for ranks that do not come to a meeting; with gloo, which can name them
# For any other collective operation, as transformers has it: shards are read at different speeds.
LOADING = timedelta(hours=2)
BRIEF = 200  # characters of a value in an error


def join() -> None:
    """Make this process one of the default process group, on its own card.

    As transformers does a little later: a collective operation before that would be on every rank's first card.
    """
    card = torch.accelerator.current_accelerator()
    kind = "cpu" if card is None or card.type == "mps" else card.type  # torch has no mesh of mps
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind != "cpu" else None
    if device is not None:
        torch.accelerator.set_device_index(device.index)
    if not distributed.is_initialized():
        backend = get_distributed_backend(kind)
        distributed.init_process_group(backend, timeout=LOADING, device_id=device if backend == "nccl" else None)


def leave() -> None:
    """Give up the default process group, if there is one: the end of a program that went well.

    Threads of gloo that still hold a tensor while the interpreter ends abort the process ("terminate called without an
    active exception"), and torchrun then reports a failure after all work is done. Ranks do not wait for one another here:
    while one writes for longer than the group's time-out, the others would fail, and a launcher would end it.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()


class RankError(RuntimeError):
    """Another rank failed, or differs from this one."""


class Meeting:
    """The points at which the ranks of the default process group compare notes while they do ``what``."""

    def __init__(self, what: str):
        self.what = what
        self.is_over = False

    def meet(self, told: Mapping[str, Any]) -> None:
        """Wait for all ranks, and compare what they tell.

        Raises:
            RankError: a rank failed, did not come, or tells something else than rank 0. On all ranks, with one text.
        """
        found = self._gather((None, dict(told)))
        for rank, (failure, _) in enumerate(found):
            if failure is not None:
                raise RankError(f"{self.what}: rank {rank} failed: {failure}")
        wanted = found[0][1]
        for rank, (_, other) in enumerate(found):
            for name, value in wanted.items():
                if other.get(name) != value:
                    raise RankError(f"{self.what}: {name}: {_difference(value, other.get(name), rank)}")

    def tell(self, error: Exception) -> None:
        """Come to the others' next meeting with an error of one's own, which the caller raises."""
        if distributed.is_initialized() and not self.is_over:
            # where the others are gone as well there is no one to tell
            with contextlib.suppress(RuntimeError):
                self._gather((f"{type(error).__name__}: {error}", {}))

    def _gather(self, own: tuple[str | None, dict]) -> list[tuple[str | None, dict]]:
        found: list = [None] * distributed.get_world_size()
        try:
            if distributed.get_backend() == "gloo":
                distributed.monitored_barrier(timeout=WAIT, wait_all_ranks=True)
            distributed.all_gather_object(found, own)
        except RuntimeError as error:
            self.is_over = True
            raise RankError(f"{self.what}: waited for all ranks, and not all came: {error}") from error
        self.is_over = own[0] is not None
        return found


_current: ContextVar[Meeting | None] = ContextVar("meeting", default=None)


def current() -> Meeting | None:
    """The meeting that this call is part of."""
    return _current.get()


@contextlib.contextmanager
def meeting(what: str) -> Iterator[Meeting]:
    """Ranks that do ``what`` together: none returns before all have come to the end of it.

    Raises:
        RankError: another rank failed, or differs.
    """
    one = Meeting(what)
    token = _current.set(one)
    try:
        yield one
        one.meet({})
    except RankError:
        raise
    except Exception as error:
        one.tell(error)
        raise
    finally:
        _current.reset(token)


def _difference(wanted: Any, found: Any, rank: int) -> str:
    """The first fields in which two values of one name differ."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        said = ", ".join(f"{name}={_brief(found.get(name))}" for name in names[:3])
        like = ", ".join(f"{name}={_brief(wanted.get(name))}" for name in names[:3])
        return f"found {said} on rank {rank}, wanted {like} as on rank 0"
    return f"found {_brief(found)} on rank {rank}, wanted {_brief(wanted)} as on rank 0"


def _brief(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= BRIEF else f"{said[:BRIEF]}…"


def versions(package: str) -> dict[str, str]:
    """What all ranks must run: this ``package``'s version, transformers' and torch's."""
    import transformers

    return {"modeling_deepseek_moe": package, "transformers": transformers.__version__, "torch": torch.__version__}
