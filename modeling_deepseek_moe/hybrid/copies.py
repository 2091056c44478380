"""Experts into an accelerator's memory: on CUDA through pinned memory and on a stream of their own, while others are computed."""

from collections.abc import Iterable, Sequence

import torch

Event = torch.cuda.Event
DEPTH = 2  # one piece of pinned memory is written while the other is copied


class Copies:
    """Copies of up to ``nbytes`` each to ``device``, in the order that they are asked for."""

    def __init__(self, device: torch.device, nbytes: int):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and torch.cuda.is_available():
            self._stream = torch.cuda.Stream(device)
            self._pinned = torch.empty((DEPTH, nbytes), dtype=torch.uint8, device="cpu", pin_memory=True)
            self._read: list[Event | None] = [None] * DEPTH
            self._next = 0

    def mark(self) -> Event | None:
        """The event that says when what was launched on the device so far is over; ``None`` where nothing is put off."""
        if self._stream is None:
            return None
        event = Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def put(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Event | None = None
    ) -> Event | None:
        """Begin to copy, once ``after`` is over; the event that says when that is done, ``None`` if it is."""
        pairs = [(_bytes(source), _bytes(target)) for source, target in zip(sources, targets, strict=True)]
        if self._stream is None:
            for source, target in pairs:
                target.copy_(source)
            return None
        number = self._next
        self._next = (number + 1) % DEPTH
        read = self._read[number]
        if read is not None:
            read.synchronize()
        if after is not None:
            self._stream.wait_event(after)
        start, event = 0, Event()
        self._read[number] = event
        with torch.cuda.stream(self._stream):
            try:
                for source, target in pairs:
                    staged = self._pinned[number, start : start + source.numel()]
                    staged.copy_(source)
                    target.copy_(staged, non_blocking=True)
                    start += source.numel()
            finally:  # of a copy that fails too: what was begun is still being read
                event.record(self._stream)
        return event

    def let_wait(self, events: Iterable[Event | None]) -> None:
        """What is launched on the device from here on comes after ``events``."""
        for event in events:
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes, so that nothing that copies them knows a dtype to round to."""
    return tensor.contiguous().view(-1).view(torch.uint8)
