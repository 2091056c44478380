"""A checkpoint folder written by all ranks: each writes shards of its own, of what it holds most of, and rank 0 the index.

No rank holds more than its part of the model and a few megabytes. Files have temporary names until all of them are on the
disk; then rank 0 renames them together, and a failure on any rank is an error on every rank, with nothing changed.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm.auto import tqdm

from modeling_deepseek_moe.checkpoint.atomic import flushed, remove_leftovers, temporary_path
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.index import INDEX_NAME, WEIGHTS_NAME, index_text, is_weights
from modeling_deepseek_moe.checkpoint.lock import locked_folder
from modeling_deepseek_moe.checkpoint.transaction import RECORD_NAME, finish, move_in
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, parse_size, plan_shards, write_shard
from modeling_deepseek_moe.distributed.exchange import Box, Exchange, Holdings, Wanted


@dataclass(frozen=True)
class Part:
    """A tensor to be written: a box of one that the ranks hold.

    Attributes:
        name, dtype, shape: of what is written.
        tensor, box: what it is made of.
        make: what becomes of the box's values, whole; ``None``: they are written as they are.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: str
    box: Box
    make: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return self.plan(iter(())).nbytes

    def plan(self, pieces: Iterator[torch.Tensor]) -> TensorPlan:
        return TensorPlan(self.name, self.dtype, self.shape, lambda: self._made(pieces))

    def _made(self, pieces: Iterator[torch.Tensor]) -> torch.Tensor | Iterator[torch.Tensor]:
        if not self.shape or self.make is not None:
            rows = [piece.reshape(-1, *self.box.sizes[-1:]) for piece in pieces]
            whole = torch.cat(rows)  # a matrix, or a value
            return whole.reshape(self.shape) if self.make is None else self.make(whole)
        return (piece.reshape(-1, *self.shape[1:]) for piece in pieces)


def choose_owners(holdings: Holdings, parts: Iterable[Part]) -> list[Wanted]:
    """Who writes which part: the rank that holds most of it; of several, the one that writes least so far."""
    loads, wanted = [0] * holdings.ranks, []
    for part in parts:
        weights = holdings.weights_of(part.tensor, part.box)
        owner = min(range(holdings.ranks), key=lambda rank: (-weights[rank], loads[rank], rank))
        loads[owner] += part.nbytes
        wanted.append(Wanted(part.tensor, part.box, owner))
    return wanted


def write_from_ranks(
    folder: str | os.PathLike,
    holdings: Holdings,
    parts: list[Part],
    *,
    max_shard_size: int | str = "5GB",
    texts: Mapping[str, str],
) -> None:
    """Write a checkpoint folder, which all ranks see, from all ranks. Called on all of them, with the same parts.

    Raises:
        OSError, ValueError, CheckpointError: as `checkpoint.writer.write_checkpoint`, on the rank where it happened; on the
            others a RuntimeError that names that rank. What the folder held before stays.
    """
    wanted = choose_owners(holdings, parts)
    exchange = Exchange(holdings, wanted)
    shards = _name_shards(exchange, parts, parse_size(max_shard_size), holdings.ranks)
    index = {INDEX_NAME: index_text({name: plans for name, (_, plans) in shards.items()})} if len(shards) > 1 else {}
    plain = dict(sorted(texts.items(), key=lambda text: text[0] != "config.json"))
    with contextlib.ExitStack() as stack:
        failure, names = None, None
        if holdings.rank == 0:
            try:
                names = _prepare(Path(folder), stack, shards, plain | index)
            except OSError as error:
                failure = error
        told: list[Any] = [names, None if failure is None else f"{type(failure).__name__}: {failure}"]
        distributed.broadcast_object_list(told, src=0)
        _raise_on_all(failure, {0: told[1]} if told[1] else {})
        temporary = {name: Path(folder) / hidden for name, hidden in told[0].items()}
        try:
            failure = _write_own(temporary, shards, holdings.rank, exchange)
            if failure is None and holdings.rank == 0:
                failure = _write_texts(temporary, plain | index)
            _agree(failure)
            if holdings.rank == 0:
                weights = {name: temporary[name] for name in (*shards, *index)}
                failure = _rename(Path(folder), {name: temporary[name] for name in plain}, weights)
            _agree(failure)
        except BaseException:
            own = (
                temporary if holdings.rank == 0 else {n: temporary[n] for n in shards if shards[n][0] == holdings.rank}
            )
            for path in own.values():
                path.unlink(missing_ok=True)
            raise


def _name_shards(
    exchange: Exchange, parts: list[Part], max_shard_size: int, ranks: int
) -> dict[str, tuple[int, list[TensorPlan]]]:
    """Every file of the checkpoint, with the rank that writes it and what it holds, rank by rank."""
    own: dict[int, list[TensorPlan]] = {rank: [] for rank in range(ranks)}
    for number, (part, wanted) in enumerate(zip(parts, exchange.wanted, strict=True)):
        own[wanted.owner].append(part.plan(exchange.receive(number)))
    files = [(rank, plans) for rank in own if own[rank] for plans in plan_shards(own[rank], max_shard_size).values()]
    if len(files) == 1:
        return {WEIGHTS_NAME: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def _prepare(folder: Path, stack: contextlib.ExitStack, shards: Mapping, texts: Mapping[str, str]) -> dict[str, str]:
    """Lock and tidy the folder on rank 0; the temporary name of each file to come."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: found a file, wanted a directory to save into")
    stack.enter_context(locked_folder(folder))
    finish(folder)
    names = (*texts, *shards)
    remove_leftovers(folder, lambda name: name in (*names, RECORD_NAME) or is_weights(name))
    total = sum(plan.nbytes for _, plans in shards.values() for plan in plans)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise OSError(errno.ENOSPC, f"{folder}: found {free} bytes free, wanted {total} to write the checkpoint")
    return {name: temporary_path(folder / name).name for name in names}


def _write_own(temporary: dict[str, Path], shards: Mapping, rank: int, exchange: Exchange) -> Exception | None:
    """This rank's files; the exchange is gone through to its end whatever happens."""
    failure: Exception | None = None
    try:
        with tqdm(disable=True) as bar:
            for name, (owner, plans) in shards.items():
                if owner == rank:
                    write_shard(temporary[name], name, plans, bar)
    except (OSError, ValueError, CheckpointError) as error:  # told to all ranks, and raised by each
        failure = error
    exchange.finish()
    return failure


def _write_texts(temporary: dict[str, Path], texts: Mapping[str, str]) -> OSError | None:
    try:
        for name, text in texts.items():
            with flushed(temporary[name], name, len(data := text.encode())) as stream:
                stream.write(data)
    except OSError as error:
        return error
    return None


def _rename(folder: Path, texts: dict[str, Path], weights: dict[str, Path]) -> OSError | None:
    absent = next((name for name, path in weights.items() if not path.exists()), None)
    if absent is not None:
        return FileNotFoundError(
            f"{folder}: found no {absent} where rank 0 runs, wanted a folder that all ranks share"
        )
    leaving = [path.name for path in folder.iterdir() if is_weights(path.name) and not path.is_dir()]
    try:
        move_in(folder, texts, weights, leaving)
    except OSError as error:
        return error
    return None


def _agree(failure: Exception | None) -> None:
    """
    Raises:
        Exception: ``failure``; or another rank had one, which is named.
    """
    said: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(said, None if failure is None else f"{type(failure).__name__}: {failure}")
    _raise_on_all(failure, {rank: text for rank, text in enumerate(said) if text})


def _raise_on_all(failure: Exception | None, said: Mapping[int, str]) -> None:
    if failure is not None:
        raise failure
    if said:
        rank, text = next(iter(said.items()))
        raise RuntimeError(f"rank {rank} could not save ({text}): nothing was written on any rank")
