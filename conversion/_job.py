"""Writing what a conversion makes: shard by shard, resumable, and in sight only when it is complete.

Everything goes to ``OUT.partial``, which one run at a time holds: each shard under a temporary name, flushed and
renamed, then noted in ``OUT.journal``. The journal opens with what decides all that is written; a run that finds
another one refuses. At the end the folder is renamed to ``OUT``. So ``OUT`` either is not there or is whole.
"""

import collections
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from modeling_deepseek_moe import machine
from modeling_deepseek_moe.checkpoint.atomic import (
    copy_flushed,
    flush_folder,
    remove_leftovers,
    temporary_path,
    write_file,
)
from modeling_deepseek_moe.checkpoint.index import INDEX_NAME, index_text
from modeling_deepseek_moe.checkpoint.journal import Journal, read_journal
from modeling_deepseek_moe.checkpoint.lock import locked_folder
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, write_shard
from modeling_deepseek_moe.conversion._source import Source

PIECES = "shards"

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
OF_A_RUN = ("trainer_state.json",)  # what a training keeps next to a model
# tensors that an estimate makes: their largest size, the places of the checkpoint, the number in a row
SAMPLE_BYTES, SAMPLE_SPOTS, SAMPLE_RUN = 256 << 20, 6, 8


@dataclass
class Job:
    """Files to be written, and from what: shards by name, and the new config. Side files are the first source's.

    Attributes:
        report, decided_by: as `Output` has them.
    """

    name: str
    options: dict
    sources: list[Source]
    shards: dict[str, list[TensorPlan]]
    config: dict
    with_index: bool = True
    report: Callable[[], Iterable[str]] = tuple
    decided_by: Sequence[dict] = ()

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for shard in self.shards.values() for plan in shard)

    @property
    def read_bytes(self) -> int:
        return sum(source.reader.nbytes for source in self.sources)

    @cached_property
    def copies(self) -> list[Path]:
        """Tokenizer, chat template, generation config and the like: all but weights, the config, a training's and hidden files."""
        return sorted(
            path
            for path in self.sources[0].folder.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name != "config.json"
            if not path.name.endswith(WEIGHTS) and path.name not in OF_A_RUN
        )

    def run(self) -> dict:
        """All that decides what is written, for the journal: inputs by path, size and time, and every header to be."""
        files = [file for source in self.sources for file in source.reader.files] + self.copies
        inputs = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        outputs = [
            (shard, [(plan.name, str(plan.dtype), plan.shape) for plan in plans])
            for shard, plans in self.shards.items()
        ]
        return {
            "conversion": self.name,
            "options": self.options,
            "inputs": _digest([inputs, self.config, *self.decided_by]),
            "outputs": _digest([outputs, self.with_index]),
        }


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def journal_file(out: Path) -> Path:
    """Next to the folder, so that the folder can take its final name with nothing in it to be tidied up."""
    return out.with_name(out.name + ".journal")


def finished_shards(job: Job, out: Path) -> set[str]:
    """Shards that an interrupted run of this very job left complete.

    Raises:
        FileExistsError: ``OUT`` is there, or ``OUT.partial`` is no one's.
        ValueError: ``OUT.partial`` belongs to another job.
    """
    _refuse_existing(out)
    partial, journal = partial_folder(out), journal_file(out)
    if not partial.exists() or not any(partial.iterdir()):
        return set()
    if not journal.is_file():
        raise FileExistsError(f"{partial}: found files without {journal.name}, wanted those of a run: remove it first")
    written, _ = read_journal(journal, _as_journalled(job), PIECES, _way_out(partial))
    sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
    return {name for name, size in written.items() if sizes.get(name) == size}


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out}: found it already there, wanted a new folder")


def _as_journalled(job: Job) -> dict:
    return json.loads(json.dumps(job.run()))


def _way_out(partial: Path) -> str:
    return f"these are other inputs or options; if no run is under way, remove {partial} to begin again"


def check_space(job: Job, out: Path, finished: set[str]) -> None:
    """
    Raises:
        OSError: what is left to be written does not fit.
    """
    wanted = sum(plan.nbytes for name, shard in job.shards.items() if name not in finished for plan in shard)
    wanted += sum(file.stat().st_size for file in job.copies)
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < wanted:
        raise OSError(f"{out}: found {free} bytes free, wanted {wanted} to write the checkpoint")


def _existing_parent(out: Path) -> Path:
    return next(path for path in out.absolute().parents if path.exists())


class _Progress:
    """What `write_shard` reports to, from several threads."""

    def __init__(self, report: Callable[[int], None]):
        self._report, self._lock = report, threading.Lock()

    def update(self, nbytes: int) -> None:
        with self._lock:
            self._report(nbytes)


def estimate(job: Job, out: Path, finished: set[str], workers: int = 1, seconds: float = 3.0) -> float:
    """Seconds that the rest of a job may take, from making some of its tensors and writing one file for a moment.

    Raises:
        CheckpointError: a tensor that was tried cannot be made.
    """
    left = [plan for name, shard in job.shards.items() if name not in finished for plan in shard]
    if not left:
        return 0.0
    small = [plan for plan in left if plan.nbytes <= SAMPLE_BYTES] or left[:1]
    _make(small[0])  # pays for what is set up once
    made, spent, deadline = 0, 0.0, time.perf_counter() + seconds
    for spot in range(SAMPLE_SPOTS):
        start = len(small) * spot // SAMPLE_SPOTS
        for plan in small[start : start + SAMPLE_RUN]:  # neighbours, since codes and scales are made together
            began = time.perf_counter()
            _make(plan)
            now = time.perf_counter()
            made, spent = made + plan.nbytes, spent + now - began
            if now > deadline:  # then one at each spot
                break
    total = sum(plan.nbytes for plan in left)
    return total * (spent / max(made, 1) / workers + _seconds_to_write(out))


def _make(plan: TensorPlan) -> None:
    tensor = plan.produce()
    if not isinstance(tensor, torch.Tensor):
        collections.deque(tensor, maxlen=0)  # made a range of rows at a time


def _seconds_to_write(out: Path) -> float:
    """Per byte, with what it takes to reach the disk."""
    parent = _existing_parent(out)
    data = os.urandom(1 << 20) * 64
    with tempfile.TemporaryFile(dir=parent) as stream:
        began = time.perf_counter()
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        return (time.perf_counter() - began) / len(data)


def run(job: Job, out: Path, *, workers: int = 1, report: Callable[[int], None] = lambda nbytes: None) -> int:
    """Write what is not yet written, then give the folder its name.

    Returns:
        How many files were finished before.

    Raises:
        BlockingIOError: the same, or another conversion, writes there.
        OSError, ValueError: as `finished_shards` and `check_space`.
    """
    _refuse_existing(out)
    partial = partial_folder(out)
    with locked_folder(partial):
        finished = finished_shards(job, out)
        check_space(job, out, finished)
        remove_leftovers(partial)
        if not any(partial.iterdir()):
            journal_file(out).unlink(missing_ok=True)  # of a run that is gone
        with contextlib.closing(Journal(journal_file(out), job.run(), PIECES, _way_out(partial))) as journal:
            try:
                _write_shards(job, partial, finished, journal, workers, report)
            except BaseException:
                if not any(partial.iterdir()):
                    journal.file.unlink()
                raise
        for file in job.copies:
            copy_flushed(file, partial / file.name)
        write_file(partial / "config.json", json.dumps(job.config, indent=2, ensure_ascii=False) + "\n")
        if job.with_index:
            write_file(partial / INDEX_NAME, index_text(job.shards))
        for source in job.sources:  # a file rewritten meanwhile would have gone in half old, half new
            for file in source.reader.files:
                source.reader.mapped.open(file).close()
        partial.rename(out)
        flush_folder(out.absolute().parent)
        journal_file(out).unlink()
        return len(finished)


def _write_shards(
    job: Job, partial: Path, finished: set[str], journal: Journal, workers: int, report: Callable[[int], None]
) -> None:
    bar, lock, stop = _Progress(report), threading.Lock(), threading.Event()

    def write(name: str) -> None:
        if name in finished:
            bar.update(sum(plan.nbytes for plan in job.shards[name]))
            return
        if stop.is_set():
            return
        temporary = temporary_path(partial / name)
        try:
            write_shard(temporary, name, job.shards[name], bar)
            nbytes = temporary.stat().st_size
            temporary.replace(partial / name)
            flush_folder(partial)
            with lock:
                journal.add({name: nbytes})
        except BaseException:
            stop.set()
            temporary.unlink(missing_ok=True)
            raise

    own, threads = torch.get_num_threads(), machine.threads()
    # the workers share the cores: each has threads of its own to compute with
    with ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
    ) as pool:
        try:
            for _ in pool.map(write, job.shards):
                pass
        except BaseException:
            stop.set()
            raise
        finally:
            torch.set_num_threads(own)
