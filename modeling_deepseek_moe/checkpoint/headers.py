"""safetensors headers: what a file says of its tensors, checked before a byte of them is used.

A shard of DeepSeek-V3 has hundreds of tensors and a checkpoint has 163 shards, so what is done for every tensor is
kept to a dictionary look-up and a comparison; everything that tensors share is checked once a file.
"""

import json
import math
import os
import stat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_deepseek_moe.terminal import shown

MAX_DIMS, MAX_NAME = 64, 1024  # a number in a name is one that Python turns into an integer
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
# How a file begins that git-lfs put in the place of a large one; its first 8 bytes are no length that a header has.
LFS_POINTER = b"version https://git-lfs"
# Every entry has these once. Counted in the text, since a parser keeps only the last of two entries of one name.
ENTRY_FIELDS = (b'"dtype"', b'"shape"', b'"data_offsets"')
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted: the message names file, tensor, what was found and what was wanted.

    Not a `ValueError`: `pipeline` takes those for "not this class" and loads the folder with transformers' own, with
    random values for what is missing. Names come from the checkpoint: their control characters are shown, not obeyed.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class MisfitError(CheckpointError, RuntimeError):
    """A tensor that fits its own folder's config, and not the one that the caller made of it.

    A `RuntimeError`, since that is what transformers raises for it.
    """


class TensorInfo(NamedTuple):
    """One tensor as its header describes it. ``start`` and ``end`` are byte offsets into ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class _Kind(NamedTuple):
    """What tensors of one dtype and shape have in common."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def check_is_regular(file: Path, status: os.stat_result) -> None:
    """Refuse what blocks or never ends when it is read.

    Raises:
        CheckpointError: a folder, a pipe, a device.
    """
    if not stat.S_ISREG(status.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"))
        found = next((kind for is_kind, kind in kinds if is_kind(status.st_mode)), "something special")
        raise CheckpointError(f"{file}: found {found}, wanted a regular file")


def refuse_pointer(file: Path, head: bytes) -> None:
    """
    Raises:
        CheckpointError: a file that begins with ``head`` stands for one that git-lfs has yet to fetch.
    """
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file}: found a git-lfs pointer, wanted the file that it stands for: run `git lfs pull`, or download it"
        )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is absent, truncated, or its header contradicts itself.
    """
    try:
        status = file.stat()
        check_is_regular(file, status)
        size = status.st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if head == LFS_POINTER[:8]:
                refuse_pointer(file, head + stream.read(len(LFS_POINTER) - 8))
            header_bytes = int.from_bytes(head, "little")
            if len(head) < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: truncated or not safetensors: found {size} bytes, wanted at least {8 + header_bytes} "
                    "for the header it announces"
                )
            text = stream.read(header_bytes)
    except OSError as error:
        found = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"a file that cannot be read ({error.strerror})"
        )
        raise CheckpointError(f"{file}: found {found}, wanted a safetensors shard") from None
    try:
        # a size such as 128.0 stays text: as a number it would pass for the integer that it equals
        header = json.loads(text, parse_float=str)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{file}: found a header that is not JSON ({error}), wanted a JSON object") from None

    longest = max(entries, key=len, default="")
    if len(longest) > MAX_NAME:
        raise CheckpointError(
            f"{file}: tensor {longest[:60]}...: found a name of {len(longest)} characters, wanted at most {MAX_NAME}"
        )
    if any(text.count(field) != len(entries) for field in ENTRY_FIELDS):
        _refuse_repeated(file, text)
    data_start = 8 + header_bytes
    tensors = _parse_entries(file, entries, data_start)
    end = data_start
    for info in sorted(tensors.values(), key=itemgetter(4, 5)):  # by start and end
        if info.start != end:
            raise CheckpointError(f"{file}: tensor {info.name}: found data at byte {info.start}, wanted {end}")
        end = info.end
    if end != size:
        problem = "truncated" if size < end else "trailing bytes"
        raise CheckpointError(f"{file}: {problem}: found {size} bytes, wanted {end} as its header describes")
    return tensors


def _refuse_repeated(file: Path, text: bytes) -> None:
    def check(pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        for name in set(names):
            if names.count(name) > 1:
                raise CheckpointError(f"{file}: tensor or field {name}: found it twice in the header, wanted it once")
        return dict(pairs)

    json.loads(text, parse_float=str, object_pairs_hook=check)


def _parse_entries(file: Path, entries: dict[str, dict], data_start: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    kinds: dict[tuple, _Kind] = {}
    for name, entry in entries.items():
        try:
            dtype, shape, nbytes = kinds[entry["dtype"], tuple(entry["shape"])]
            begin, end = entry["data_offsets"]
            known = type(begin) is int and type(end) is int and begin >= 0 and end - begin == nbytes
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            kind, begin, end = _parse_entry(file, name, entry)
            kinds[entry["dtype"], kind.shape] = kind
            dtype, shape, _ = kind
        tensors[name] = TensorInfo(name, dtype, shape, file, data_start + begin, data_start + end)
    return tensors


def _parse_entry(file: Path, name: str, entry: dict) -> tuple[_Kind, int, int]:
    """The first of its kind in a file, or one that is to be refused."""
    try:
        dtype_name, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file}: tensor {name}: found {str(entry)[:200]!r}, wanted dtype, shape, data_offsets"
        ) from None
    if dtype_name not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name}: found dtype {dtype_name}, wanted one of {', '.join(DTYPES)}")
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise CheckpointError(f"{file}: tensor {name}: found {str(entry)[:200]!r}, wanted non-negative integers")
    if len(shape) > MAX_DIMS:
        raise CheckpointError(f"{file}: tensor {name}: found {len(shape)} dimensions, wanted at most {MAX_DIMS}")
    wanted = math.prod(shape) * DTYPES[dtype_name].itemsize
    if end - begin != wanted:
        raise CheckpointError(
            f"{file}: tensor {name}: found {end - begin} bytes, wanted {wanted} for {dtype_name} {list(shape)}"
        )
    return _Kind(DTYPES[dtype_name], shape, wanted), begin, end
