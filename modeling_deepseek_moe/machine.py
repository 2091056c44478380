"""The machine at hand: memory, threads, GPUs, and how fast weights can be read from each memory, measured."""

import mmap
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from modeling_deepseek_moe import cgroups

CACHES = Path("/sys/devices/system/cpu")
CGROUP = cgroups.ROOT
# Several times the last-level cache, so that every pass reads memory; bounded, so that probing disturbs no one.
CACHE_MULTIPLE = 4
SMALLEST_BUFFER, LARGEST_BUFFER = 256 << 20, 4 << 30
DISK_READ = 8 << 20  # about a matrix of an expert of DeepSeek-V3


@dataclass(frozen=True)
class Bandwidth:
    """The fastest of ``passes`` reads of a buffer of ``buffer_bytes``."""

    bytes_per_second: float
    buffer_bytes: int
    passes: int


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as torch sees it."""

    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """Main memory and GPUs. ``ram_available`` is what a new process may take without swapping."""

    ram_bytes: int
    ram_available: int
    threads: int
    bandwidth: Bandwidth | None
    gpus: tuple[Gpu, ...] = ()
    gpu_bandwidth: Bandwidth | None = None


def memory() -> tuple[int, int]:
    """Main memory in bytes, and what of it a new process may take without swapping: of its control groups, if they limit it."""
    found, allowed = psutil.virtual_memory(), cgroups.memory(CGROUP)
    total = found.total if allowed.limit is None else min(found.total, allowed.limit)
    return total, min(found.available, total if allowed.available is None else allowed.available)


def threads() -> int:
    """The threads to compute with: torch's, and no more than the control groups of this process have processors for."""
    return cgroups.threads(torch.get_num_threads(), CGROUP)


def keep_to_quota() -> None:
    """Give torch no more threads than `threads`."""
    if threads() < torch.get_num_threads():
        torch.set_num_threads(threads())


def probe_machine(measure: bool = True) -> Machine:
    """Look at this machine; with ``measure``, spend about a second on its read bandwidth (and one on a GPU's)."""
    total, available = memory()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, size = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), size, free))
    return Machine(
        ram_bytes=total,
        ram_available=available,
        threads=threads(),
        bandwidth=measure_read_bandwidth(available // 4) if measure else None,
        gpus=tuple(gpus),
        gpu_bandwidth=measure_read_bandwidth(gpus[0].free_bytes // 4, "cuda:0") if measure and gpus else None,
    )


def measure_read_bandwidth(most_bytes: int = LARGEST_BUFFER, device: str = "cpu", seconds: float = 1.0) -> Bandwidth:
    """Sum a buffer larger than every cache, on all threads, again and again for ``seconds``; the fastest pass counts.

    Reading is what decoding does with weights. Other work on the machine makes the figure smaller, never larger.
    """
    size = min(max(CACHE_MULTIPLE * last_level_cache(), SMALLEST_BUFFER), LARGEST_BUFFER, most_bytes)
    # Written, not just allocated: untouched pages are all one page, which stays in the cache.
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    deadline, times = time.perf_counter() + seconds, []
    while len(times) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        buffer.sum().item()
        times.append(time.perf_counter() - start)
    return Bandwidth(buffer.nbytes / min(times), buffer.nbytes, len(times))


def measure_disk(folder: Path, seconds: float = 1.0) -> Bandwidth | None:
    """Bytes per second that random reads of `DISK_READ` bytes get from the largest weights file below ``folder``.

    Past the page cache, as experts are read. ``None`` where there is no file of some size, or no such reading.
    """
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size) if folder.is_dir() else []
    if not files or files[-1].stat().st_size < 4 * DISK_READ or not hasattr(os, "O_DIRECT"):
        return None
    places = files[-1].stat().st_size // DISK_READ
    buffer = mmap.mmap(-1, DISK_READ)  # page-aligned, as direct reads want it
    try:
        descriptor = os.open(files[-1], os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    order, start, passes = random.Random(0), time.perf_counter(), 0
    try:
        while passes < 3 or time.perf_counter() - start < seconds:
            if os.preadv(descriptor, [buffer], order.randrange(places) * DISK_READ) != DISK_READ:
                return None
            passes += 1
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return Bandwidth(passes * DISK_READ / (time.perf_counter() - start), DISK_READ, passes)


def last_level_cache() -> int:
    """Bytes of the last-level caches of all sockets together (0 where the system does not say)."""
    sizes: dict[tuple[int, str], int] = {}
    for cache in CACHES.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size = int((cache / "level").read_text()), (cache / "size").read_text().strip()
            sizes[level, (cache / "shared_cpu_list").read_text().strip()] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)
