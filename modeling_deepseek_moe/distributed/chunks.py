"""What a sharded checkpoint holds: each tensor as boxes of it in files, as ``torch.distributed.checkpoint`` writes them.

Two forms: ``__0_0.distcp`` files next to ``.metadata`` (accelerate's FSDP2), and ``shard-*.safetensors`` (transformers'
``distributed_checkpoint=True``). Opening reads what is said of the tensors; their bytes are read by ranges of rows.
"""

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, read_header
from modeling_deepseek_moe.checkpoint.ranges import read_range

METADATA = ".metadata"
SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
SHARDING_INFO = "DCP_SHARDING_INFO"  # in a safetensors header: where in its tensor each entry begins
# What .metadata, a pickle, may name: one from elsewhere could have any function called.
CLASSES = re.compile(
    r"torch\.distributed\.checkpoint\.metadata \w+|torch\.distributed\.checkpoint\.filesystem _StorageInfo"
    r"|torch\.serialization _get_layout|torch (Size|u?int\d+|b?float\d+\w*|bool)|pathlib(\._local)? \w*Path"
)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor in a file.

    Attributes:
        offsets, sizes: where it lies in the tensor.
        start, length: the entry's bytes in ``file``.
        is_archive: they are what ``torch.save`` made of it, and not its values alone.
    """

    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int
    is_archive: bool

    @cached_property
    def values_start(self) -> int:
        """Where its values begin in the file, one row after the other.

        Raises:
            CheckpointError: the entry cannot be read, or is compressed or stored in another order.
        """
        if not self.is_archive:
            return self.start
        fault = f"{self.file}: entry at {self.start}"
        with open(self.file, "rb") as stream:
            view = _View(stream, self.start, self.length)
            try:
                found = torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
                with zipfile.ZipFile(view) as archive:
                    record = next(record for record in archive.infolist() if record.filename.endswith("/data/0"))
            except (RuntimeError, OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{fault}: found no tensor ({error}), wanted what torch.save writes") from error
            is_plain = found.is_contiguous() and not found.storage_offset() and not record.compress_type
            if not is_plain or found.dtype != self.dtype or tuple(found.shape) != self.sizes:
                wanted = f"{self.dtype} {list(self.sizes)} in rows"
                raise CheckpointError(f"{fault}: found {found.dtype} {list(found.shape)}, wanted {wanted}")
            # the record's own header: 30 bytes, its name and what fills up to a border
            view.seek(record.header_offset)
            header = view.read(30)
            name, filler = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            return self.start + record.header_offset + 30 + name + filler


@dataclass
class StoredTensor:
    """One tensor: its dtype and shape, and the boxes that make it up."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)

    def check(self) -> None:
        """
        Raises:
            CheckpointError: the boxes are not the whole tensor, once.
        """
        found = sum(math.prod(chunk.sizes) for chunk in self.chunks)
        if found != math.prod(self.shape):
            raise CheckpointError(
                f"tensor {self.name}: found {found} values in {len(self.chunks)} part(s), wanted {math.prod(self.shape)} of "
                f"{list(self.shape)}: a shard is missing, or ranks wrote the same part"
            )

    def read(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A box of the tensor, in memory of its own. Of each part only the rows that it needs are read.

        Raises:
            CheckpointError: a file is cut short.
        """
        out = torch.empty(sizes, dtype=self.dtype)
        for chunk in self.chunks:
            begin = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offsets, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True))
            out[there] = _read_rows(chunk, here)
        return out


def _read_rows(chunk: Chunk, box: tuple[slice, ...]) -> torch.Tensor:
    """``box`` of a chunk. From the first dimension of which more than one index is wanted, whole rows are read."""
    ranges = [range(part.start, part.stop) for part in box] or [range(1)]
    sizes = chunk.sizes or (1,)
    leading = next((dim for dim, part in enumerate(ranges) if len(part) > 1), len(ranges) - 1)
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    first = sum(ranges[dim].start * strides[dim] for dim in range(leading + 1))
    shape = (*([1] * leading), len(ranges[leading]), *sizes[leading + 1 :])
    tensor = torch.empty(shape, dtype=chunk.dtype)
    with open(chunk.file, "rb", buffering=0) as stream:
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        read_range(stream, chunk.values_start + first * chunk.dtype.itemsize, memory, str(chunk.file))
    return tensor[(slice(None),) * (leading + 1) + box[leading + 1 :]].reshape(
        [part.stop - part.start for part in box]
    )


class _View(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int):
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, memory) -> int:
        self._stream.seek(self._start + self._at)
        data = self._stream.read(max(0, min(len(memory), self._length - self._at)))
        memory[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if CLASSES.fullmatch(f"{module} {name}") is None:
            raise pickle.UnpicklingError(f"{module}.{name} is named in it")
        return super().find_class(module, name)


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds a sharded checkpoint of one of the two forms."""
    return (folder / METADATA).is_file() or any(True for _ in _shards(folder))


def _shards(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))


def read_chunks(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a sharded checkpoint by the names that the model has for them, each checked to be whole.

    Raises:
        CheckpointError: it is not complete (names the file), or not one.
    """
    tensors = _from_metadata(folder) if (folder / METADATA).is_file() else _from_shards(folder)
    for tensor in tensors.values():
        try:
            tensor.check()
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    return tensors


def _from_metadata(folder: Path) -> dict[str, StoredTensor]:
    try:
        with open(folder / METADATA, "rb") as stream:
            metadata = _Metadata(stream).load()
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        paths = metadata.planner_data or {}
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"{folder / METADATA}: found no usable metadata ({error}), wanted what torch.distributed.checkpoint writes"
        ) from error
    tensors: dict[str, StoredTensor] = {}
    for key, entry in entries.items():
        if hasattr(entry, "chunks"):
            name = str(paths.get(key, (key,))[-1])
            tensors[key] = StoredTensor(name, entry.properties.dtype, tuple(entry.size))
    boxes = {key: {tuple(b.offsets): tuple(b.sizes) for b in entries[key].chunks} for key in tensors}
    sizes: dict[Path, int] = {}
    for index, place in places.items():
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{folder}: tensor {index.fqn}: found compressed parts, wanted them as they are")
        file = folder / place.relative_path
        if file not in sizes:
            sizes[file] = _size(file, folder)
        if place.offset + place.length > sizes[file]:
            raise CheckpointError(
                f"{file}: found {sizes[file]} bytes, wanted {place.offset + place.length}: the shard is cut short"
            )
        tensor = tensors.get(index.fqn)
        if tensor is not None:
            offsets = tuple(index.offset)
            box = offsets, boxes[index.fqn][offsets]
            tensor.chunks.append(Chunk(tensor.dtype, *box, file, place.offset, place.length, True))
    return {tensor.name: tensor for tensor in tensors.values()}


def _size(file: Path, folder: Path) -> int:
    if file.parent != folder or not file.is_file():
        raise CheckpointError(f"{folder}: found no {file.name}, wanted that shard: a rank's part is missing")
    return file.stat().st_size


def _from_shards(folder: Path) -> dict[str, StoredTensor]:
    files = list(_shards(folder))
    if not files:
        raise CheckpointError(
            f"{folder}: found neither {METADATA} nor shard-*.safetensors, wanted a sharded checkpoint"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                text = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            where = json.loads(text["__metadata__"][SHARDING_INFO])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: found no {SHARDING_INFO} ({error!r}), wanted a rank's part") from None
        for name, info in read_header(file).items():
            offsets = tuple(where[name]["saved_offsets"])
            ends = tuple(a + b for a, b in zip(offsets, info.shape, strict=True))
            tensor = tensors.setdefault(name, StoredTensor(name, info.dtype, ends))
            tensor.shape = tuple(map(max, tensor.shape, ends))
            tensor.chunks.append(Chunk(info.dtype, offsets, info.shape, file, info.start, info.nbytes, False))
    numbers = {int(file.name[6:11]) for file in files}
    missing = sorted(set(range(1, max(numbers))) - numbers)
    if missing:
        raise CheckpointError(f"{folder}: found no shard {missing}, wanted the parts of all ranks")
    return tensors
