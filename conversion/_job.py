"""Writing what a conversion makes: shard by shard, resumable, and in sight only when it is complete.

Everything goes to ``OUT.partial``: each shard under a temporary name, flushed and renamed, then noted in
``OUT.journal``.
The journal opens with a digest of the inputs and of everything to be written; a run that finds another one refuses.
At the end the folder is renamed to ``OUT``. So ``OUT`` either is not there or is whole.
"""

import collections
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from modeling_deepseek_moe.conversion._source import Source

from modeling_deepseek_moe.checkpoint.index import INDEX_NAME
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, plan_shards, write_shard

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
# tensors that an estimate makes: at most so large, at so many places of the checkpoint, so many in a row
SAMPLE_BYTES, SAMPLE_SPOTS, SAMPLE_RUN = 256 << 20, 6, 8


@dataclass
class Job:
    """Files to be written, and from what: shards by name, the new config, and files copied as they are."""

    name: str
    options: dict
    sources: list[Source]
    shards: dict[str, list[TensorPlan]]
    config: dict | None = None
    with_index: bool = True
    copies: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, name, options, sources, plans: list[TensorPlan], config, max_shard_size: int) -> "Job":
        shards = plan_shards(plans, max_shard_size)
        return cls(name, options, sources, shards, config, len(shards) > 1, side_files(sources[0].folder))

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for shard in self.shards.values() for plan in shard)

    @property
    def read_bytes(self) -> int:
        return sum(source.reader.nbytes for source in self.sources)

    def digest(self) -> str:
        """Of all that decides what is written: inputs by path, size and time, options, and every header to be."""
        parts = [self.name, self.options, self.config, self.with_index]
        files = [file for source in self.sources for file in source.reader.files] + self.copies
        parts.append([(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
        for shard, plans in self.shards.items():
            parts.append((shard, [(plan.name, str(plan.dtype), plan.shape) for plan in plans]))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def side_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and the like: all but weights, the config and hidden files."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name != "config.json"
        if not path.name.endswith(WEIGHTS)
    )


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def journal_file(out: Path) -> Path:
    """Beside the folder, so that the folder can take its final name with nothing in it to be tidied up."""
    return out.with_name(out.name + ".journal")


def finished_shards(job: Job, out: Path) -> set[str]:
    """Shards that an interrupted run of this very job left complete.

    Raises:
        FileExistsError: ``OUT`` is there, or ``OUT.partial`` belongs to another job.
    """
    if out.exists():
        raise FileExistsError(errno.EEXIST, "found it already there, wanted a new folder", str(out))
    partial, journal = partial_folder(out), journal_file(out)
    if not partial.exists():
        return set()
    lines = journal.read_text().split("\n") if journal.is_file() else [""]
    if lines[0] != job.digest():
        raise FileExistsError(
            errno.EEXIST, "found a run with other inputs or options, wanted this one's: remove it first", str(partial)
        )
    # The last piece is what a kill may have cut short: only lines that end count.
    return {name for name in lines[1:-1] if (partial / name).is_file()}


def check_space(job: Job, out: Path, finished: set[str]) -> None:
    wanted = sum(plan.nbytes for name, shard in job.shards.items() if name not in finished for plan in shard)
    wanted += sum(file.stat().st_size for file in job.copies)
    parent = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"found {free} bytes free, wanted {wanted} to write the checkpoint", str(out))


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
    parent = next(path for path in out.absolute().parents if path.exists())
    data = os.urandom(1 << 20) * 64
    with tempfile.TemporaryFile(dir=parent) as stream:
        began = time.perf_counter()
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        return (time.perf_counter() - began) / len(data)


def run(job: Job, out: Path, *, workers: int = 1, report: Callable[[int], None] = lambda nbytes: None) -> None:
    """Write what is not yet written, then give the folder its name."""
    finished = finished_shards(job, out)
    check_space(job, out, finished)
    partial, journal = partial_folder(out), journal_file(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written anew, so that a line that a kill cut short does not run into the next one.
    _write_text(journal, "".join(f"{line}\n" for line in (job.digest(), *sorted(finished))))
    partial.mkdir(exist_ok=True)  # after the journal: one without the other is somebody else's
    bar, lock, stop = _Progress(report), threading.Lock(), threading.Event()

    def write(name: str) -> None:
        if name in finished:
            bar.update(sum(plan.nbytes for plan in job.shards[name]))
            return
        if stop.is_set():
            return
        temporary = partial / f".{name}.tmp"
        try:
            write_shard(temporary, name, job.shards[name], bar)
            temporary.replace(partial / name)
            _flush_folder(partial)
            with lock, journal.open("a") as stream:
                stream.write(name + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            stop.set()
            temporary.unlink(missing_ok=True)
            raise

    threads = torch.get_num_threads()
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
            torch.set_num_threads(threads)
    for file in job.copies:
        shutil.copyfile(file, partial / file.name)
    if job.config is not None:
        _write_text(partial / "config.json", json.dumps(job.config, indent=2, ensure_ascii=False) + "\n")
    if job.with_index:
        weight_map = {plan.name: file for file, shard in job.shards.items() for plan in shard}
        index = {"metadata": {"total_size": job.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(partial / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    for source in job.sources:  # a file rewritten meanwhile would have gone in half old, half new
        for file in source.reader.files:
            source.reader.mapped.open(file).close()
    partial.rename(out)
    _flush_folder(out.absolute().parent)
    journal.unlink()


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
