"""Experts of all layers in memory: the resident set, reads in flight, and eviction.

Memory is cut into slots of one expert each, used again and again. An expert is worth what the LRFU policy (Lee et al.,
2001) says: every use counts, and counts half as much after `HALF_LIFE` further passes through its layer; the least
worth makes room. Between equals it is the one whose layer comes up latest: plain LRU would always drop, of a model
that goes through its layers in a circle, what is wanted next.

A layer asks for its experts once (`ExpertCache.serve`) and gets them in ascending order, whatever was in memory.
"""

import bisect
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.streaming.memory import Memory
from modeling_deepseek_moe.streaming.reader import Reader
from modeling_deepseek_moe.streaming.slots import ExpertStats, Key, Layer, Slot
from modeling_deepseek_moe.streaming.threads import Read, ReadQueue

HALF_LIFE = 8
_starting = threading.Lock()  # of caches in a process that was forked
LEAST_SLOTS = 2  # one expert that is computed, one that is read
WASTE = 0.05  # of the bytes read may have been read ahead for nothing


class ExpertCache:
    """The experts of ``layers`` within ``budget`` bytes.

    Args:
        infos: for each layer, `MappedExperts.reads`: bound methods, held weakly.
        num_experts: of each layer.
        files: that the experts lie in.
        budget: bytes to hold experts in.

    Raises:
        ValueError: the budget is smaller than two experts.
    """

    def __init__(self, infos: Sequence[Callable], num_experts: Sequence[int], files: MappedFiles, budget: int):
        self.layers = [Layer(method, count) for method, count in zip(infos, num_experts, strict=True)]
        self.slot_bytes = slot_bytes = max(layer.slot_bytes for layer in self.layers)
        self.budget, self.files = budget, files
        self.num_slots = min(budget // slot_bytes, sum(num_experts))
        if self.num_slots < LEAST_SLOTS:
            raise ValueError(
                f"expert memory of {budget:,} bytes is too small: the least is {LEAST_SLOTS * slot_bytes:,} bytes, one "
                "expert being computed and one being read"
            )
        self._start()

    def _start(self) -> None:
        """Empty memory, new threads: at first, and in a process that was forked."""
        pid = os.getpid()
        self._lock = threading.RLock()  # one layer at a time
        self.memory = Memory(self.num_slots * self.slot_bytes, wiped_on_fork=True)
        self._queue = ReadQueue(Reader(self.files))
        self._closing = weakref.finalize(self, _close, self._queue, pid)
        self._slots: dict[Key, Slot] = {}
        self._free = list(range(self.num_slots))[::-1]
        self._reading: dict[Key, Slot] = {}
        self._ahead: list[Slot] = []
        most_experts = max(layer.num_experts for layer in self.layers)
        self._worth = np.full((len(self.layers), most_experts), -np.inf)
        self._held = np.full((2, self.num_slots), -1)  # layer and expert in each slot
        self._pinned = np.zeros(self.num_slots, dtype=bool)
        self._stats = ExpertStats()
        self._pid = pid  # last: other threads of the process go by it

    def _enter(self) -> None:
        if self._pid != os.getpid():
            with _starting:
                if self._pid != os.getpid():
                    self._closing.detach()  # its threads stayed with the parent
                    self._start()
        self._lock.acquire()

    def stats(self, reset: bool = False) -> ExpertStats:
        """What the cache did so far; with ``reset`` it counts from zero again and keeps what it holds."""
        self._enter()
        try:
            stats = self._stats
            stats.budget_bytes, stats.held_bytes = self.budget, len(self._slots) * self.slot_bytes
            stats.read_seconds, stats.direct_io = self._queue.busy_seconds(reset), self._queue.reader.direct
            if reset:
                self._stats = ExpertStats()
                for slot in self._slots.values():
                    slot.wasted = False
            return replace(stats)
        finally:
            self._lock.release()

    def holds(self, key: Key) -> bool:
        """Whether an expert is in memory, or on its way."""
        return key in self._slots

    def addresses(self, slot: Slot) -> list[int]:
        """Where the slot's tensors are in memory: three matrices' codes, and their scales where they are read too."""
        start = self.memory.address + slot.number * self.slot_bytes
        return [start + place for place in slot.plan.places]

    def views(self, slot: Slot, infos: Iterable[TensorInfo]) -> list[torch.Tensor]:
        """The slot's tensors, which ``infos`` describes."""
        start = slot.number * self.slot_bytes
        parts = zip(slot.plan.places, infos, strict=True)
        return [self.memory.tensor(start + place, info.shape, info.dtype) for place, info in parts]

    def close(self) -> None:
        """End the threads and close the files. A cache that is collected closes itself."""
        self._closing()

    def serve(
        self,
        layer: int,
        wanted: Sequence[int],
        tokens: int = 1,
        most: int | None = None,
        ahead: Callable[[], Sequence[Key]] | None = None,
    ) -> Generator[list[Slot], None, None]:
        """The ``wanted`` experts of a layer in ascending order, in groups, each as soon as it is in memory.

        A slot is good until the next group is asked for.

        Args:
            wanted: ascending.
            tokens: for the statistics.
            most: in one group.
            ahead: what the next layer will likely want, the likeliest first; asked when nothing is left to order here.

        Raises:
            CheckpointError: an expert cannot be read.
        """
        self._enter()
        done = 0
        try:
            missing = self._begin(layer, wanted)
            self._stats.tokens += tokens if layer == 0 else 0
            while done < len(wanted):
                self._order(layer, missing, wanted[done])
                if not missing and ahead is not None and self._read_ahead(ahead):
                    ahead = None
                # while reads are still to be ordered, groups are small: a slot is wanted as soon as it is computed
                limit = most or (max(1, self.num_slots // 2) if missing else len(wanted))
                group = self._ready(layer, wanted[done : done + limit])
                if not group:
                    self._wait(self._slots.get((layer, wanted[done])))
                    continue
                yield group
                for slot in group:
                    slot.wanted = False
                    self._pin(slot)
                done += len(group)
            if ahead is not None:
                self._read_ahead(ahead)
        finally:
            if done < len(wanted):  # given up
                for slot in self._slots.values():
                    slot.wanted = False
                    self._pin(slot)
            self._lock.release()

    def _begin(self, layer: int, wanted: Sequence[int]) -> list[int]:
        """Note what is wanted; returns what is not in memory, ascending."""
        stats, nbytes = self._stats, self.layers[layer].nbytes
        for read in self._queue.drop_ahead():
            self._forget(read.slot)
        for slot in [slot for slot in self._reading.values() if slot.is_ready]:
            self._settle(slot)
        predicted, wanted_keys = set(), {(layer, expert) for expert in wanted}
        for slot in self._ahead:
            slot.ahead, slot.wasted = False, slot.key not in wanted_keys
            if not slot.wasted:
                predicted.add(slot.key)
            elif slot.read is None:
                stats.bytes_wasted += self._nbytes(slot)
            self._pin(slot)
        self._ahead.clear()
        missing = []
        for expert in wanted:
            slot = self._slots.get((layer, expert))
            if slot is None:
                missing.append(expert)
                continue
            if slot.wasted:  # not in vain after all
                slot.wasted = False
                predicted.add(slot.key)
                stats.bytes_wasted -= nbytes if slot.read is None else 0
            slot.wanted, slot.hit = True, slot.key not in predicted
            self._pin(slot)
        missed = len(missing) + len(predicted)
        stats.hits += len(wanted) - missed
        stats.misses += missed
        stats.bytes_missed += missed * nbytes
        self.layers[layer].passes += 1
        self.layers[layer].missed = missed
        rows = np.asarray(wanted, dtype=np.int64)
        now = self.layers[layer].passes * math.log(2) / HALF_LIFE
        self._worth[layer, rows] = np.logaddexp(self._worth[layer, rows], now)
        return missing

    def _order(self, layer: int, missing: list[int], least: int) -> None:
        """Order reads of missing experts, in ascending order, as far as there is room."""
        while missing:
            number = self._room(layer)
            if number is None and missing[0] == least:
                # All that is in memory is wanted: what is wanted last makes room for what is wanted first.
                last = max(
                    (slot for slot in self._slots.values() if slot.wanted and slot.read is None),
                    key=lambda slot: slot.key[1],
                    default=None,
                )
                if last is not None:
                    bisect.insort(missing, last.key[1])
                    if last.hit:  # else it is a miss already, read in vain
                        self._stats.hits -= 1
                        self._stats.misses += 1
                        self._stats.bytes_missed += self._nbytes(last)
                    number = self._evict(last)
            if number is None:
                return
            self._read((layer, missing.pop(0)), number)

    def _read_ahead(self, ahead: Callable[[], Sequence[Key]]) -> bool:
        """Order reads for the next layer while they are likely enough to be wanted; whether there was room to."""
        stats = self._stats
        for key in ahead():
            if key in self._slots:
                continue
            risked = stats.bytes_wasted + sum(self._nbytes(slot) for slot in self._ahead)
            if risked + self.layers[key[0]].nbytes > WASTE * stats.bytes_read:
                break
            number = self._room(key[0] - 1)
            if number is None:
                return False
            self._read(key, number, ahead=True)
        return True

    def _read(self, key: Key, number: int, ahead: bool = False) -> None:
        slot = Slot(number, key, self.layers[key[0]].plan(key[1]), wanted=not ahead, ahead=ahead)
        place = number * self.slot_bytes
        slot.read = Read(
            slot, [(run, self.memory.part(place + run.place, run.nbytes)) for run in slot.plan.runs], ahead
        )
        try:
            self._queue.put(slot.read)
        except RuntimeError:
            slot.read = None
            self._free.append(number)
            raise
        self._slots[key] = self._reading[key] = slot
        self._held[:, number] = key
        self._pin(slot)
        if ahead:
            self._ahead.append(slot)

    def _room(self, layer: int) -> int | None:
        """A slot to read into: a free one, or that of the expert worth least; ``None`` if all are in use."""
        if self._free:
            return self._free.pop()
        layers, experts = self._held
        later = (layers - layer) % len(self.layers)
        later[later == 0] = len(self.layers)  # the layer just gone through comes up last
        worth = self._worth[layers, experts] - 1e-6 * later
        worth[self._pinned] = np.inf
        number = int(worth.argmin())
        if self._pinned[number]:
            return None
        return self._evict(self._slots[tuple(self._held[:, number].tolist())])

    def _evict(self, slot: Slot) -> int:
        del self._slots[slot.key]
        self._pinned[slot.number] = False
        return slot.number

    def _forget(self, slot: Slot) -> None:
        """A read that was ordered and not begun, or that failed, leaves nothing."""
        del self._reading[slot.key]
        if slot.ahead:
            self._ahead.remove(slot)
        self._free.append(self._evict(slot))

    def _pin(self, slot: Slot) -> None:
        self._pinned[slot.number] = slot.is_pinned

    def _ready(self, layer: int, experts: Sequence[int]) -> list[Slot]:
        """The first of ``experts`` that are in memory, without a gap."""
        group = []
        for expert in experts:
            slot = self._slots.get((layer, expert))
            if slot is None or not slot.is_ready:
                break
            error = self._settle(slot)
            if error is not None:
                raise error
            group.append(slot)
        return group

    def _settle(self, slot: Slot) -> Exception | None:
        """Note that a slot's read is over; returns its error, and forgets the slot if there was one."""
        if slot.read is None:
            return None
        read = slot.read
        if read.error is not None:
            self._forget(slot)
            return read.error
        nbytes, stats = self._nbytes(slot), self._stats
        del self._reading[slot.key]
        slot.read = None
        stats.bytes_read += nbytes
        stats.bytes_prefetched += nbytes if read.ahead else 0
        stats.bytes_wasted += nbytes if slot.wasted else 0
        self._pin(slot)
        return None

    def _wait(self, slot: Slot | None) -> None:
        """For the slot's read; without a slot, for any read to end whose slot may then make room."""
        start = time.perf_counter()
        self._queue.wait([slot.read] if slot else [other.read for other in self._reading.values()])
        self._stats.stall_seconds += time.perf_counter() - start
        if slot is None:
            for other in [other for other in self._reading.values() if other.is_ready]:
                error = self._settle(other)
                if error is not None and other.wanted:  # no one orders it a second time
                    raise error

    def _nbytes(self, slot: Slot) -> int:
        return self.layers[slot.key[0]].nbytes


def _close(queue: ReadQueue, pid: int) -> None:
    if os.getpid() == pid:  # a forked process has neither the threads nor, maybe, their lock
        queue.close()
