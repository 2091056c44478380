"""Reading and writing checkpoint folders: lazy mapped tensors, atomic streamed shards.

A checkpoint folder holds safetensors shards and, when there is more than one, an index
``model.safetensors.index.json``. `CheckpointReader` checks every header (file size, dtype, shape, offsets)
before a byte of it is used and hands out tensors that are views into the memory-mapped file. `write_checkpoint`
streams tensors to disk one at a time, under temporary names that are renamed once everything is written.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch
from tqdm.auto import tqdm

from modeling_deepseek_moe.headers import DTYPE_NAMES, CheckpointError, TensorInfo, read_header
from modeling_deepseek_moe.mapped import MappedFiles

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
FLUSH_BYTES = 64 << 20  # written before the disk is asked to begin with them
MAX_PIECES = 1024  # that one preadv fills: IOV_MAX, the same on Linux and macOS


def resolve_shards(folder: Path, *, must_exist: bool = True) -> tuple[list[Path], dict[str, str] | None]:
    """The shard files of a folder and the index's weight map (``None`` for a single file, which comes first).

    With ``must_exist=False`` shards may be absent, as in the midst of a download.

    Raises:
        CheckpointError: nothing to load, a malformed index, or an index naming a path outside the folder.
    """
    index_file = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME], None
    if not index_file.is_file():
        raise CheckpointError(f"{folder}: found neither {WEIGHTS_NAME} nor {INDEX_NAME}, wanted one of them")
    try:
        index = json.loads(index_file.read_bytes())
        weight_map = index["weight_map"]
        # transformers, which reads the index again, fails without metadata
        if not (weight_map and isinstance(weight_map, dict) and isinstance(index["metadata"], dict)):
            raise ValueError("empty, or no JSON object")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index_file}: found no usable index ({error!r}), wanted metadata, weight_map"
        ) from None
    shards = {str(shard): name for name, shard in reversed(weight_map.items())}  # with the first tensor of each
    for shard, name in sorted(shards.items()):
        path = PurePosixPath(shard.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in shard or not path.parts:
            raise CheckpointError(
                f"{index_file}: tensor {name}: found shard path {shard!r}, wanted a path inside {folder}"
            )
        if must_exist and not (folder / shard).is_file():
            raise CheckpointError(f"{index_file}: tensor {name}: found no file {shard} in {folder}, wanted that shard")
    return [folder / shard for shard in sorted(shards)], weight_map


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

    def read_into(self, infos: Iterable[TensorInfo], place: Callable[[TensorInfo], memoryview]) -> None:
        """Copy tensors into memory, each to its ``place``, without touching what lies between them in the files.

        For small tensors scattered over large files. Those that are neighbours in a file are read in one go.
        """
        by_file: dict[Path, list[TensorInfo]] = {}
        for info in infos:
            by_file.setdefault(info.file, []).append(info)
        for file, tensors in by_file.items():
            tensors.sort(key=attrgetter("start"))
            with self.mapped.open(file) as stream:
                if hasattr(os, "posix_fadvise"):  # a plain read would bring in far more around each
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for run in _runs(tensors):
                    _read_run(stream, run, place)


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


def _read_run(stream: io.FileIO, run: list[TensorInfo], place: Callable[[TensorInfo], memoryview]) -> None:
    start, end = run[0].start, run[-1].end
    if hasattr(os, "preadv") and os.preadv(stream.fileno(), [place(info) for info in run], start) == end - start:
        return
    # No preadv here, or it stopped short, as it may (2 GiB at most, a signal): one by one.
    for info in run:
        stream.seek(info.start)
        if stream.readinto(place(info)) != info.nbytes:
            raise CheckpointError(f"{info.file}: tensor {info.name}: found the file's end, wanted {info.end} bytes")


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: what its header will say, and how to produce it when its turn comes.

    ``produce`` returns the tensor, or yields it in ranges of rows.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], torch.Tensor | Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorPlan":
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def parse_size(size: int | str) -> int:
    """``"5GB"`` → 5·10⁹, ``"1GiB"`` → 2³⁰; an integer is bytes already."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", size.upper())
    if match is None:
        raise ValueError(f"size {size!r} is not a number of bytes such as '500MB', '5GB' or '2GiB'")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def plan_shards(plans: Iterable[TensorPlan], max_shard_size: int) -> dict[str, list[TensorPlan]]:
    """Split tensors, in their order, into files of at most ``max_shard_size`` bytes (a larger tensor stands alone)."""
    shards: list[list[TensorPlan]] = [[]]
    room = max_shard_size
    for plan in plans:
        if shards[-1] and plan.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(plan)
        room -= plan.nbytes
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_checkpoint(
    folder: str | os.PathLike,
    plans: Iterable[TensorPlan],
    *,
    max_shard_size: int | str = "5GB",
    texts: Mapping[str, str] | None = None,
    show_progress: bool = True,
) -> None:
    """Write a checkpoint folder: shards, index and small text files, all or nothing.

    Everything goes to temporary names beside the final ones, is flushed to the disk, and is renamed at the end; a
    failure removes the temporary files and leaves what the folder held before. One tensor is in flight at a time.
    Weights of an earlier save are removed.

    Args:
        plans: the tensors in the order in which they fill the shards.
        max_shard_size: bytes, or text such as ``"5GB"``.
        texts: other files of the folder by name, e.g. ``config.json``.

    Raises:
        OSError: the disk is full (checked first, and again by every write); the message names the file.
        CheckpointError: a tensor comes in another dtype or shape than planned.
        ValueError: a tensor cannot be made, as the codes of one that is not finite.
    """
    folder = Path(folder)
    shards = plan_shards(plans, parse_size(max_shard_size))
    texts = dict(texts or {})
    total = sum(plan.nbytes for shard in shards.values() for plan in shard)
    if len(shards) > 1:
        weight_map = {plan.name: file for file, shard in shards.items() for plan in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[INDEX_NAME] = json.dumps(index, indent=2) + "\n"

    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (*shards, *texts)}
    try:
        free = shutil.disk_usage(folder).free
        if free < total:
            raise OSError(errno.ENOSPC, f"{folder}: found {free} bytes free, wanted {total} to write the checkpoint")
        with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=not show_progress) as bar:
            for name, shard in shards.items():
                write_shard(temporary[name], name, shard, bar)
        for name, text in texts.items():
            data = text.encode()
            with _flushed(temporary[name], name, len(data)) as stream:
                stream.write(data)
        _move_in(folder, temporary)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _flushed(path: Path, name: str, size: int) -> Iterator[BinaryIO]:
    """A file that is on the disk once it is closed. Errors call it ``name``, its final name."""
    try:
        with path.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{path.parent / name}: {error.strerror} while writing {size} bytes") from error


def write_shard(path: Path, name: str, plans: list[TensorPlan], bar: tqdm) -> None:
    """Write one safetensors file, flushed to the disk. Errors call it ``name``; ``bar`` is told of bytes written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    # Widest dtype first, as the safetensors library does: every tensor then lies aligned for its own dtype.
    for plan in sorted(plans, key=lambda plan: -plan.dtype.itemsize):
        header[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _flushed(path, name, 8 + len(text) + offset) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        flusher = _Flusher(stream.fileno())
        try:
            for plan in plans:  # in their own order: what is made together (codes and their scales) comes together
                stream.seek(8 + len(text) + header[plan.name]["data_offsets"][0])
                try:
                    for data in _pieces(plan):
                        stream.write(data)
                        flusher.written(len(data))
                        bar.update(len(data))
                except (CheckpointError, ValueError) as error:
                    kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
                    raise kind(f"{path.parent / name}: tensor {plan.name}: {error}") from error
        finally:
            flusher.close()


def _pieces(plan: TensorPlan) -> Iterator[memoryview]:
    """The bytes of a tensor, which may be made whole or in ranges of rows."""
    made, rows = plan.produce(), 0
    for tensor in [made] if isinstance(made, torch.Tensor) else made:
        whole = plan.shape if tensor is made else (*tensor.shape[:1], *plan.shape[1:])
        rows += tensor.shape[0] if tensor.ndim else 1
        if tensor.dtype != plan.dtype or tuple(tensor.shape) != whole:
            raise CheckpointError(f"found {tensor.dtype} {list(tensor.shape)}, wanted {plan.dtype} {list(plan.shape)}")
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(data)
    if rows != (plan.shape[0] if plan.shape else 1):
        raise CheckpointError(f"found {rows} rows, wanted {plan.dtype} {list(plan.shape)}")


class _Flusher:
    """Keeps the disk busy while a file is still being made, so that its last flush has little left to do."""

    def __init__(self, descriptor: int):
        self._descriptor, self._waiting, self._flush = descriptor, 0, None
        self._thread = ThreadPoolExecutor(1)

    def written(self, nbytes: int) -> None:
        self._waiting += nbytes
        if self._waiting >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self.check()
            self._flush, self._waiting = self._thread.submit(os.fsync, self._descriptor), 0

    def check(self) -> None:
        if self._flush is not None:
            self._flush.result()  # a disk that fails says so here

    def close(self) -> None:
        self._thread.shutdown()
        self.check()


def _move_in(folder: Path, temporary: Mapping[str, Path]) -> None:
    """Give new files their names, in place of an earlier save's; an error puts those back.

    The old files leave first: shards of two saves never lie together under their final names.
    """
    replaced = [path for path in folder.iterdir() if path.name in temporary or _is_weights(path)]
    aside = {path: folder / f".{path.name}.{os.getpid()}.old" for path in replaced if not path.is_dir()}
    try:
        for path, old in aside.items():
            path.replace(old)
        for name, path in temporary.items():
            path.replace(folder / name)
    except BaseException:
        for name, path in temporary.items():
            if not path.exists():
                (folder / name).unlink(missing_ok=True)
        for path, old in aside.items():
            if old.exists():
                old.replace(path)
        raise
    for old in aside.values():
        old.unlink()


def _is_weights(path: Path) -> bool:
    """Whether a file is what a save names its shards and index, and so would be read as part of the checkpoint."""
    return path.name in (WEIGHTS_NAME, INDEX_NAME) or bool(SHARD_NAME.fullmatch(path.name))
