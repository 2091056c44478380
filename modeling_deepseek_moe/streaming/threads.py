"""Reads in the background: a few threads, what is wanted now before what may be wanted next."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from modeling_deepseek_moe.streaming.reader import Reader, Run

THREADS = 2  # one reads while the other hands over what it read; more do not raise the disk's throughput
THREAD_NAME = "deepseek-moe-experts"


class Read:
    """The runs of one expert, each with the memory it goes to."""

    __slots__ = ("ahead", "done", "error", "parts", "slot")

    def __init__(self, slot: Any, parts: Sequence[tuple[Run, memoryview]], ahead: bool):
        self.slot, self.parts, self.ahead = slot, parts, ahead
        self.done = False
        self.error: Exception | None = None


class ReadQueue:
    """Reads in the order in which they were put, those ahead of need when no other is left or under way.

    The threads start with the first read and hold on to this object alone: who made it may be collected, and closes it.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self._changed = threading.Condition()
        self._now: deque[Read] = deque()
        self._ahead: deque[Read] = deque()
        self._under_way = [0, 0]  # now, ahead
        self._threads = 0
        self._closed = False
        self._busy, self._busy_since = 0.0, 0.0

    def put(self, read: Read) -> None:
        """Order a read.

        Raises:
            RuntimeError: the queue is closed, or the system starts no thread to read with.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("expert memory was closed while it was in use")
            if self._threads < THREADS:
                try:
                    threading.Thread(target=self._work, name=THREAD_NAME, daemon=True).start()
                    self._threads += 1
                except RuntimeError:
                    if not self._threads:
                        raise
            (self._ahead if read.ahead else self._now).append(read)
            self._changed.notify_all()

    def drop_ahead(self) -> list[Read]:
        """Take back the reads ahead that no thread has begun."""
        with self._changed:
            dropped = list(self._ahead)
            self._ahead.clear()
        return dropped

    def wait(self, reads: Sequence[Read]) -> None:
        """Until one of them is over."""
        assert reads, "nothing to wait for"
        with self._changed:
            while not any(read.done for read in reads):
                if self._closed:
                    raise RuntimeError("expert memory was closed while it was in use")
                self._changed.wait()

    def busy_seconds(self, reset: bool = False) -> float:
        """Time in which at least one read was under way."""
        with self._changed:
            now = time.perf_counter()
            busy = self._busy + (now - self._busy_since if any(self._under_way) else 0.0)
            if reset:
                self._busy, self._busy_since = 0.0, now
            return busy

    def close(self) -> None:
        """End the threads, after the reads that they have begun; the last one closes the files.

        It waits for no one: whoever collects the owner, in whichever thread, may be the one to call it.
        """
        with self._changed:
            self._closed = True
            for waiting in (self._now, self._ahead):
                for read in waiting:
                    read.parts = ()
                waiting.clear()
            self._changed.notify_all()
            if not self._threads:
                self.reader.close()

    def _next(self) -> tuple[Read, int] | None:
        """The next read, and its place in `_under_way`; ``None`` when closed."""
        with self._changed:
            while not self._closed:
                if self._now or (self._ahead and not self._under_way[0]):
                    kind = 0 if self._now else 1
                    if not any(self._under_way):
                        self._busy_since = time.perf_counter()
                    self._under_way[kind] += 1
                    return (self._ahead if kind else self._now).popleft(), kind
                self._changed.wait()
        return None

    def _work(self) -> None:
        while (item := self._next()) is not None:
            read, kind = item
            try:
                for run, memory in read.parts:
                    self.reader.read(run, memory)
            except Exception as error:  # raised again by the thread that waits for the read
                read.error = error
            with self._changed:
                read.done, read.parts = True, ()  # the memory is the cache's to give up
                self._under_way[kind] -= 1
                if not any(self._under_way):
                    self._busy += time.perf_counter() - self._busy_since
                self._changed.notify_all()
            del item, read
        with self._changed:
            self._threads -= 1
            if not self._threads:
                self.reader.close()
