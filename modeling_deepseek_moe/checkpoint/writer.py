"""Writing checkpoint folders: tensors streamed to the disk one at a time, everything renamed at the end or nothing."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_deepseek_moe.checkpoint.atomic import flushed, remove_leftovers, temporary_path
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError
from modeling_deepseek_moe.checkpoint.index import INDEX_NAME, WEIGHTS_NAME, index_text, is_weights
from modeling_deepseek_moe.checkpoint.lock import locked_folder
from modeling_deepseek_moe.checkpoint.transaction import RECORD_NAME, finish, move_in

FLUSH_BYTES = 64 << 20  # written before the disk is asked to begin with them


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

    Everything goes to temporary names next to the final ones, is flushed to the disk, and is renamed at the end; a
    failure removes the temporary files and leaves what the folder held before, and what a kill leaves, the next load or
    save puts right (see `transaction`). One tensor is in flight at a time. Weights of an earlier save are removed.

    Args:
        plans: the tensors in the order in which they fill the shards.
        max_shard_size: bytes, or text such as ``"5GB"``.
        texts: other files of the folder by name, e.g. ``config.json``.

    Raises:
        BlockingIOError: another save into this folder is under way.
        OSError: the disk is full (checked first, and again by every write); the message names the file.
        CheckpointError: a tensor comes in another dtype or shape than planned.
        ValueError: a tensor cannot be made, as the codes of one that is not finite.
    """
    folder = Path(folder)
    shards = plan_shards(plans, parse_size(max_shard_size))
    total = sum(plan.nbytes for shard in shards.values() for plan in shard)
    # config.json first: see `transaction`
    plain = dict(sorted((texts or {}).items(), key=lambda text: text[0] != "config.json"))
    index = {INDEX_NAME: index_text(shards)} if len(shards) > 1 else {}
    names = (*plain, *shards, *index)
    with locked_folder(folder):
        finish(folder)
        remove_leftovers(folder, lambda name: name in (*names, RECORD_NAME) or is_weights(name))
        leaving = [path.name for path in folder.iterdir() if is_weights(path.name) and not path.is_dir()]
        temporary = {name: temporary_path(folder / name) for name in names}
        try:
            free = shutil.disk_usage(folder).free
            if free < total:
                raise OSError(
                    errno.ENOSPC, f"{folder}: found {free} bytes free, wanted {total} to write the checkpoint"
                )
            with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=not show_progress) as bar:
                for name, shard in shards.items():
                    write_shard(temporary[name], name, shard, bar)
            for name, text in (plain | index).items():
                data = text.encode()
                with flushed(temporary[name], name, len(data)) as stream:
                    stream.write(data)
            weights = {name: temporary[name] for name in (*shards, *index)}
            move_in(folder, {name: temporary[name] for name in plain}, weights, leaving)
        except BaseException:
            for path in temporary.values():
                path.unlink(missing_ok=True)
            raise


def write_shard(path: Path, name: str, plans: list[TensorPlan], bar: tqdm) -> None:
    """Write one safetensors file, flushed to the disk. Errors call it ``name``; ``bar`` is told of bytes written."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
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
    with flushed(path, name, 8 + len(text) + offset) as stream:
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
        self._descriptor, self._waiting = descriptor, 0
        self._flush: Future[None] | None = None
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
