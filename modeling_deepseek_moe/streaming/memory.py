"""Page-aligned memory that is read into: taken from the system as it is first written, in huge pages where there are any."""

import contextlib
import mmap
import sys

import torch

from modeling_deepseek_moe.checkpoint.mapped import HUGE_PAGES, MAP_NORESERVE

PAGE = 4096  # what O_DIRECT wants offsets, lengths and addresses aligned to; no disk in use wants more
_WIPE_ON_FORK = 18  # Linux's value, for which the mmap module has no name


def pages(nbytes: int) -> int:
    """The bytes of as many whole pages as ``nbytes`` take."""
    return -(-nbytes // PAGE) * PAGE


class Memory:
    """``nbytes`` of anonymous memory, private to the process; pages never written take no memory.

    Args:
        wiped_on_fork: a forked process finds zeros in it, and neither process copies pages for the other's sake.
    """

    def __init__(self, nbytes: int, wiped_on_fork: bool = False):
        self.nbytes = max(pages(nbytes), PAGE)
        if sys.platform == "linux":
            # without NORESERVE the system may refuse more than it has free at this moment
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            for advice in (HUGE_PAGES, _WIPE_ON_FORK) if wiped_on_fork else (HUGE_PAGES,):
                with contextlib.suppress(OSError):  # advice that this kernel does not know
                    self._map.madvise(advice)
        else:
            self._map = mmap.mmap(-1, self.nbytes)
        self._view = memoryview(self._map)
        self.address = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()

    def part(self, start: int, nbytes: int) -> memoryview:
        return self._view[start : start + nbytes]

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view with a storage of its own; it keeps the memory."""
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)
