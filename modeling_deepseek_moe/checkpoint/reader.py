"""The tensors of a checkpoint folder: headers, checked before a byte of them is used, and views into mapped files."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo, read_header
from modeling_deepseek_moe.checkpoint.index import INDEX_NAME, resolve_shards
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.checkpoint.ranges import read_range

HUGE_PAGE = 2 << 20  # bytes
MAX_PIECES = 1024  # that one preadv fills: IOV_MAX, the same on Linux and macOS
DONT_CACHE = 0x80  # RWF_DONTCACHE: since Linux 6.14


class CheckpointReader(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint, by name. Opening reads headers only; `tensor` maps a file when it is first needed.

    ``mapped`` holds the mappings (see `MappedFiles`); a reader may be dropped while its tensors live on.
    """

    def __init__(self, files: Iterable[str | os.PathLike]):
        # absolute: a mapped file is looked at again later, from wherever the process is then
        self.files = [Path(file).absolute() for file in files]
        self.mapped = MappedFiles()
        self._tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file}: found a {file.suffix} file (a pickle?), wanted safetensors")
            self.mapped.expect(file)
            header = read_header(file)
            for name in header.keys() & self._tensors.keys():
                first = self._tensors[name].file
                raise CheckpointError(f"{file}: tensor {name}: found again, after {first}, wanted it once")
            self._tensors |= header

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "CheckpointReader":
        """Open a checkpoint folder, checking its index against the shards' headers."""
        folder = Path(folder)
        files, weight_map = resolve_shards(folder)
        reader = cls(files)
        paths = dict(zip((str(file) for file in files), reader.files, strict=True))
        paths = {shard: paths[str(folder / shard)] for shard in set((weight_map or {}).values())}
        for name, shard in (weight_map or {}).items():
            info = reader._tensors.get(name)
            if info is None or info.file is not paths[shard]:
                found = "absent" if info is None else f"in {info.file.name}"
                raise CheckpointError(f"{folder / INDEX_NAME}: tensor {name}: found {found}, wanted in {shard}")
        return reader

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # Mapping's own go by __getitem__, tensor by tensor.
    def values(self) -> ValuesView[TensorInfo]:
        return self._tensors.values()

    def items(self) -> ItemsView[str, TensorInfo]:
        return self._tensors.items()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        """A view of one tensor in its mapped file (a copy only if the file stores it misaligned for its dtype)."""
        return self.view(self._tensors[name])

    def view(self, info: TensorInfo) -> torch.Tensor:
        """As `tensor`, for what ``info`` describes: a whole tensor, or a part that lies in one piece."""
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        return self.mapped.view(info)

    def read_into(
        self, infos: Iterable[TensorInfo], place: Callable[[TensorInfo], memoryview], *, among_mapped: bool = False
    ) -> None:
        """Copy tensors into memory, each to its ``place``, past their files' mappings, of which nothing becomes resident.

        Small ones are read without what lies between them in the files, those that are neighbours in one go.

        Args:
            among_mapped: what lies around them is read from the mappings later on, or they themselves are, and is to be found in
                huge pages there. Neighbours that fill such a page are read from the mapping; of the others no small pages stay in
                the system's cache, where it can read so (Linux 6.14).

        Raises:
            CheckpointError: a file is gone, is shorter, or was written to since the checkpoint was opened.
        """
        by_file: dict[Path, list[TensorInfo]] = {}
        for info in infos:
            by_file.setdefault(info.file, []).append(info)
        for file, tensors in by_file.items():
            tensors.sort(key=attrgetter("start"))
            small, large = [], []
            for run in _runs(tensors):
                (small if run[-1].end - run[0].start < HUGE_PAGE else large).append(run)
            with self.mapped.open(file) as stream:  # which looks at the file before its mapping is read
                for info in chain.from_iterable(large):  # first: next to small pages there would be no huge one
                    if among_mapped:
                        place(info)[:] = memoryview(self.view(info).view(-1).view(torch.uint8).numpy())
                    else:
                        _read(stream, info, place(info))
                if small and hasattr(os, "posix_fadvise"):  # a plain read would bring in far more around each
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for run in small:
                    _read_run(stream, run, place, keep=not among_mapped)


def _runs(infos: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Split tensors of one file, by their start, into those that lie one right after the other."""
    run: list[TensorInfo] = []
    for info in infos:
        if run and (run[-1].end != info.start or len(run) == MAX_PIECES):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def _read_run(
    stream: io.FileIO, run: list[TensorInfo], place: Callable[[TensorInfo], memoryview], *, keep: bool
) -> None:
    """``keep``: what was read stays in the system's cache; what was there before stays in any case."""
    start, end = run[0].start, run[-1].end
    places = [place(info) for info in run]
    flags = (0,) if keep or sys.platform != "linux" else (DONT_CACHE, 0)
    for flag in flags if hasattr(os, "preadv") else ():
        # by kernels and file systems without the flag, and by Pythons that were built without flags
        with contextlib.suppress(OSError, NotImplementedError):
            if os.preadv(stream.fileno(), places, start, flag) == end - start:
                return
    # No preadv here, or it failed or stopped short, as it may (a signal, the end of the file): one by one, with its error.
    for info, held in zip(run, places, strict=True):
        _read(stream, info, held)


def _read(stream: io.FileIO, info: TensorInfo, held: memoryview) -> None:
    read_range(stream, info.start, held, f"{info.file}: tensor {info.name}")
