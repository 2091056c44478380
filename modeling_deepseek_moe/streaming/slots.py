"""What an expert cache is made of: a slot of memory, how an expert is read into it, the layers it serves, what it counts."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.streaming.reader import Run, most_bytes, plan_runs
from modeling_deepseek_moe.streaming.threads import Read

Key = tuple[int, int]  # number of the layer among those in the cache, expert


@dataclass
class ExpertStats:
    """What an expert cache did since it was made, or since `reset`.

    An expert that a layer wanted is a hit if it was in memory since an earlier use, else a miss: read on demand or,
    having been predicted, ahead of it. ``bytes_read`` counts experts' bytes; those read ahead are in it
    (``bytes_prefetched``), and of these ``bytes_wasted`` were not wanted after all.
    """

    budget_bytes: int = 0
    held_bytes: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_missed: int = 0
    bytes_prefetched: int = 0
    bytes_wasted: int = 0
    stall_seconds: float = 0.0  # that computing waited for the disk
    read_seconds: float = 0.0  # that the disk was being read
    tokens: int = 0
    direct_io: bool | None = None  # None: nothing was read yet

    @property
    def hit_rate(self) -> float | None:
        return self.hits / (self.hits + self.misses) if self.hits or self.misses else None

    @property
    def prefetch_accuracy(self) -> float | None:
        """The share of the bytes read ahead that were wanted; of those not judged yet it is taken for granted."""
        return 1 - self.bytes_wasted / self.bytes_prefetched if self.bytes_prefetched else None

    @property
    def bytes_read_per_token(self) -> float | None:
        return self.bytes_read / self.tokens if self.tokens else None

    @property
    def read_bandwidth(self) -> float | None:
        """Bytes per second while the disk was being read."""
        return self.bytes_read / self.read_seconds if self.read_seconds else None


class Plan(NamedTuple):
    """How one expert is read into a slot, and where its tensors are then, from the slot's start."""

    runs: list[Run]
    places: tuple[int, ...]


@dataclass
class Slot:
    """Memory of one expert, and what is in it. ``read`` is the read that fills it, until that is seen to be over."""

    number: int
    key: Key
    plan: Plan
    read: Read | None = None
    wanted: bool = False  # by the layer being computed, and not computed yet
    hit: bool = False  # counted as one for the layer being computed
    ahead: bool = False  # read ahead, and its layer has not come up yet
    wasted: bool = False  # read ahead, and its layer did not want it

    @property
    def is_ready(self) -> bool:
        return self.read is None or self.read.done

    @property
    def is_pinned(self) -> bool:
        return self.wanted or self.ahead or self.read is not None


class Layer:
    """Where the experts of a layer are in the files: ``infos`` is `MappedExperts.reads`, held weakly."""

    def __init__(self, infos: Callable[[int], list[TensorInfo]], num_experts: int):
        tensors = infos(0)  # a layer's experts are all of one shape
        self.infos, self.num_experts = weakref.WeakMethod(infos), num_experts
        self.nbytes, self.slot_bytes = sum(info.nbytes for info in tensors), most_bytes(tensors)
        self.plans: dict[int, Plan] = {}
        self.passes = 0
        self.missed = 0  # in the last pass

    def plan(self, expert: int) -> Plan:
        if expert not in self.plans:
            infos = self.infos()(expert)
            runs = plan_runs(infos)
            places = {info: run.place_of(info) for run in runs for info in run.infos}
            self.plans[expert] = Plan(runs, tuple(places[info] for info in infos))
        return self.plans[expert]
