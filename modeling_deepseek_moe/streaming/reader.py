"""Ranges of checkpoint files, read into memory past the page cache.

A page fault reads little at a time, and a buffered read copies every byte; a direct read of megabytes does neither,
and leaves the page cache to those who need it. Where the file system allows none, a buffered read drops its pages.
That is why this is not `read_range`: it reads whole pages to aligned places, from several threads at once through one
descriptor, and stops where a direct read does, at the file's end only.
"""

import errno
import io
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.streaming.memory import PAGE, pages

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Run(NamedTuple):
    """Tensors of one file that are read in one go, whole pages around them included.

    ``place`` is where in the reader's memory byte ``start`` of the file goes.
    """

    infos: tuple[TensorInfo, ...]
    start: int
    nbytes: int
    place: int

    @property
    def file(self) -> Path:
        return self.infos[0].file

    @property
    def end(self) -> int:
        """Where the last tensor ends in the file; the page that it ends in may reach beyond the file."""
        return self.infos[-1].end

    def place_of(self, info: TensorInfo) -> int:
        return self.place + info.start - self.start


def plan_runs(infos: Iterable[TensorInfo]) -> list[Run]:
    """How to read tensors in as few goes as possible: together where less than a page lies between them.

    The runs fill memory one after the other, from 0; it never takes more than `most_bytes` of the same tensors.
    """
    groups: list[list[TensorInfo]] = []
    for info in sorted(infos, key=lambda info: (info.file, info.start)):
        if groups and groups[-1][-1].file == info.file and 0 <= info.start - groups[-1][-1].end < PAGE:
            groups[-1].append(info)
        else:
            groups.append([info])
    runs, place = [], 0
    for group in groups:
        start = group[0].start // PAGE * PAGE
        runs.append(Run(tuple(group), start, pages(group[-1].end - start), place))
        place += runs[-1].nbytes
    return runs


def most_bytes(infos: Iterable[TensorInfo]) -> int:
    """Memory that `plan_runs` never exceeds for tensors of these sizes, wherever they lie."""
    return sum(pages(info.nbytes) + 2 * PAGE for info in infos)


class Reader:
    """Reads `Run` after `Run`, from several threads at once. ``direct`` says how: ``None`` until the first read."""

    def __init__(self, files: MappedFiles):
        self._files = files
        self._open: dict[Path, tuple[io.FileIO, bool]] = {}
        self._lock = threading.Lock()

    @property
    def direct(self) -> bool | None:
        return all(direct for _, direct in self._open.values()) if self._open else None

    def read(self, run: Run, memory: memoryview) -> None:
        """Fill ``memory``, a place of ``run.nbytes``, page-aligned.

        Raises:
            CheckpointError: the file is not the one that was opened, ends early, or cannot be read.
        """
        try:
            stream, direct = self._descriptor(run.file)
            try:
                found = self._fill(stream, direct, run, memory)
            except OSError as error:
                if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                # some file systems take the flag and then refuse the read
                stream = self._without_direct(run.file)
                found = self._fill(stream, False, run, memory)
        except OSError as error:
            raise CheckpointError(
                f"{run.file}: tensor {run.infos[0].name}: found {error.strerror or error} while reading bytes "
                f"{run.start} to {run.end}, wanted {run.end - run.start} bytes"
            ) from error
        if found < run.end - run.start:
            info = next(info for info in run.infos if info.end > run.start + found)
            have = max(0, run.start + found - info.start)
            raise CheckpointError(
                f"{run.file}: tensor {info.name}: found {have} bytes, wanted {info.nbytes}: the file was cut short "
                "while it was in use"
            )

    def close(self) -> None:
        for stream, _ in self._open.values():
            stream.close()
        self._open.clear()

    def _descriptor(self, file: Path) -> tuple[io.FileIO, bool]:
        with self._lock:
            if file not in self._open:
                stream = self._files.open(file)
                self._open[file] = (stream, _make_direct(stream))
            return self._open[file]

    def _without_direct(self, file: Path) -> io.FileIO:
        with self._lock:
            stream, direct = self._open[file]
            if direct:
                fcntl.fcntl(stream, fcntl.F_SETFL, fcntl.fcntl(stream, fcntl.F_GETFL) & ~os.O_DIRECT)
                self._open[file] = (stream, False)
            return stream

    def _fill(self, stream: io.FileIO, direct: bool, run: Run, memory: memoryview) -> int:
        """Bytes read: all, or up to where the file ends."""
        wanted, found = run.end - run.start, 0
        while found < wanted:
            if hasattr(os, "preadv"):
                got = os.preadv(stream.fileno(), [memory[found:]], run.start + found)
            else:
                with self._lock:
                    stream.seek(run.start + found)
                    got = stream.readinto(memory[found:])
            found += got
            if got == 0 or (direct and got % PAGE):  # within a page only the file's end stops a direct read
                break
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), run.start, run.nbytes, os.POSIX_FADV_DONTNEED)
        return found


def _make_direct(stream: io.FileIO) -> bool:
    """Whether reads past the page cache are possible; from here on they are."""
    if fcntl is not None and hasattr(os, "O_DIRECT"):
        try:
            fcntl.fcntl(stream, fcntl.F_SETFL, fcntl.fcntl(stream, fcntl.F_GETFL) | os.O_DIRECT)
            return True
        except OSError:  # not on this file system
            pass
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # read no more than is asked for
    return False
