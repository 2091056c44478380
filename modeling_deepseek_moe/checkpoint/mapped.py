"""Checkpoint files mapped into memory: their bytes as tensors, and a guard against files that change meanwhile.

A file that is replaced (another file takes its name) or deleted stays mapped as it was. One that is written in place
does not: its new bytes show through, and reading beyond the end of one that was cut short kills the process (SIGBUS).
No exception can be made of that signal, so the guard looks before the bytes are read.
"""

import contextlib
import errno
import io
import mmap
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo, check_is_regular

# asm-generic's value, which x86, Arm and RISC-V share; the mmap module has no name for it before Python 3.13
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", 14)  # Linux's value; other systems have no such advice


class _Identity(NamedTuple):
    """What tells a file from another of the same name, and from itself after a write."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    access: tuple[int, ...]  # mode, names, owner: what may change the last time without a byte being written

    @classmethod
    def of(cls, status: os.stat_result) -> "_Identity":
        access = status.st_mode, status.st_nlink, status.st_uid, status.st_gid
        return cls(
            *(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns),
            *(getattr(status, "st_ctime_ns", 0) if os.name == "posix" else 0, access),
        )

    def is_like(self, other: "_Identity") -> bool:
        """Whether size and time agree. Devices and inodes do not last where a folder is mounted elsewhere or again."""
        return self[2:4] == other[2:4]

    def is_written_since(self, other: "_Identity") -> bool:
        """Whether the file that ``other`` was taken of has been written to, its times set back or not.

        Another mode, owner or number of names explains a change of the inode.
        """
        if self[:2] != other[:2] or self[2:4] != other[2:4]:
            return self[:2] == other[:2]
        return self.ctime_ns != other.ctime_ns and self.access == other.access

    def __str__(self):
        return f"{self.size} bytes written at {self.mtime_ns / 1e9:.6f} (inode changed at {self.ctime_ns / 1e9:.6f})"


class _Mapping(NamedTuple):
    identity: _Identity
    memory: mmap.mmap
    address: int


class MappedFiles:
    """Files by path, each mapped when it is first asked for.

    The mapping is private and copy-on-write: views cost no memory until they are read, and writing to one never
    reaches the file. A view keeps its file mapped. A copy of this object shares the mappings; a pickled one maps the
    same files again, wherever it is unpickled, and refuses files that have changed since.
    """

    def __init__(self):
        self._mappings: dict[Path, _Mapping] = {}
        self._wanted: dict[Path, _Identity] = {}
        self._checked_at = time.monotonic()

    def view(self, info: TensorInfo) -> torch.Tensor:
        """The bytes that ``info`` describes, as a tensor with a storage of its own: saving it saves no more than that.

        A copy only if they lie misaligned for their dtype.
        """
        memory = self._mapping(info.file).memory
        if info.start % info.dtype.itemsize:
            data = torch.frombuffer(memory, dtype=torch.uint8, count=info.nbytes, offset=info.start)
            return data.clone().view(info.dtype).view(info.shape)
        count = info.nbytes // info.dtype.itemsize
        return torch.frombuffer(memory, dtype=info.dtype, count=count, offset=info.start).view(info.shape)

    def address(self, file: Path) -> int:
        """Where the first byte of a file is in memory, for as long as this object lives."""
        return self._mapping(file).address

    def find(self, tensor: torch.Tensor) -> tuple[Path, int] | None:
        """The file that a tensor is a view into, and at which byte; ``None`` if it is none."""
        address = tensor.data_ptr() if tensor.device.type == "cpu" else 0
        for file, mapping in self._mappings.items():
            if mapping.address <= address < mapping.address + len(mapping.memory):
                return file, address - mapping.address
        return None

    def _mapping(self, file: Path) -> _Mapping:
        mapping = self._mappings.get(file)
        if mapping is None:
            mapping = self._mappings[file] = self._map(file)
        return mapping

    def _map(self, file: Path) -> _Mapping:
        with self.open(file) as stream:
            identity = _Identity.of(os.fstat(stream.fileno()))
            memory = _map_privately(stream.fileno())
        _ask_for_huge_pages(memory)
        self._wanted[file] = identity
        return _Mapping(identity, memory, torch.frombuffer(memory, dtype=torch.uint8).data_ptr())

    def expect(self, file: Path) -> None:
        """From now on a file must stay as it is: `view` and `open` refuse another one."""
        try:
            status = file.stat()
        except FileNotFoundError:
            raise _gone(file) from None
        check_is_regular(file, status)
        self._wanted[file] = _Identity.of(status)

    def open(self, file: Path) -> io.FileIO:
        """A file to be read past its mapping, unbuffered: the same bytes as are mapped, or will be.

        Raises:
            CheckpointError: the file is gone, or is not the one that was mapped or expected.
        """
        if file not in self._wanted:
            self.expect(file)
        try:
            stream = file.open("rb", buffering=0)
        except FileNotFoundError:
            raise _gone(file) from None
        found = _Identity.of(os.fstat(stream.fileno()))
        if not found.is_like(self._wanted[file]) or found.is_written_since(self._wanted[file]):
            stream.close()
            raise _changed(file, found, self._wanted[file])
        return stream

    def check_unchanged(self, seconds: float = 0.0) -> None:
        """Look whether a mapped file was written to since it was mapped; at most once in ``seconds``.

        About 2 µs a file, and 0.1 µs when it is too early to look again. Code that `torch.compile` makes does not look.

        Raises:
            CheckpointError: a file was truncated or rewritten in place: its bytes cannot be used any more.
        """
        if torch.compiler.is_compiling():
            return
        now = time.monotonic()
        if now - self._checked_at < seconds:
            return
        self._checked_at = now
        for file, mapping in self._mappings.items():
            wanted, memory, _ = mapping
            size = memory.size()  # of the file that is mapped, whatever its name is now
            if size != wanted.size:
                raise _changed(file, wanted._replace(size=size), wanted)
            try:
                found = _Identity.of(file.stat())
            except OSError:
                continue  # deleted or out of reach: the mapping holds on to its bytes
            if found.is_written_since(wanted):
                raise _changed(file, found, wanted)
            if found[:2] == wanted[:2] and found != wanted:
                self._mappings[file] = mapping._replace(identity=found)

    def __deepcopy__(self, memo) -> "MappedFiles":
        return self

    def __getstate__(self) -> dict:
        return {"wanted": self._wanted}

    def __setstate__(self, state: dict) -> None:
        MappedFiles.__init__(self)
        for file, wanted in state["wanted"].items():
            self.expect(file)
            if not self._wanted[file].is_like(wanted):
                raise _changed(file, self._wanted[file], wanted)


def _gone(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: found no such file, wanted a safetensors shard")


def _changed(file: Path, found: _Identity, wanted: _Identity) -> CheckpointError:
    return CheckpointError(
        f"{file}: found {found}, wanted {wanted}: the file changed after the checkpoint was opened; load it again"
    )


def _map_privately(descriptor: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno != errno.ENOMEM or sys.platform != "linux":
            raise
    # Linux sets memory aside for the pages that may come to be written, and has none for a file larger than memory.
    return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Have Linux read a file 4 MB at a time, into pages of 2 MB where its file system has such (XFS; ext4 since Linux 6.16).

    Models in INT4 decode a twentieth faster from these, in FP8 no faster: a token meets each page once, and of small ones there are 512
    times as many whose place is to be looked up. What the system holds of a file in small pages stays so. A lone row of an embedding
    brings 4 MB with it.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel that was built without
            memory.madvise(HUGE_PAGES)
