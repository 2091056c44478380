"""What the benchmarks share: the machine's own limits, interleaved timing, and result files."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def beyond_caches(least: int) -> int:
    """Bytes, ``least`` or twice the largest cache: virtual machines are told of their host's, which have grown to half a gigabyte."""
    sizes = [file.read_text().strip().removesuffix("K") for file in CACHES.glob("index*/size")]
    return max(least, 2 * 1024 * max((int(size) for size in sizes if size.isdecimal()), default=0))


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes/s that all of torch's threads read from memory: the best of several sums over a buffer beyond the caches."""
    data = torch.ones(beyond_caches(512 << 20), dtype=torch.uint8).view(torch.int64)
    return data.nbytes / min(seconds_of(data.sum) for _ in range(repeats))


def gemm_flops(dtype: torch.dtype = torch.bfloat16, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of torch's square matrix product: the best of several."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: torch.nn.functional.linear(a, b)) for _ in range(repeats))


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant in every round, and which of them other programs disturbed.

    A sample is disturbed when the kernel took the processor from a thread of this process, once, or more than
    `QUIET_SWITCHES` times per second in a long one. ``median`` is that of the others, or, if they are fewer than three,
    of the fastest third.
    """

    seconds: tuple[float, ...]
    disturbed: tuple[bool, ...]

    @property
    def counted(self) -> list[float]:
        clean = [value for value, bad in zip(self.seconds, self.disturbed, strict=True) if not bad]
        return clean if len(clean) >= 3 else sorted(self.seconds)[: max(1, len(self.seconds) // 3)]

    @property
    def median(self) -> float:
        return statistics.median(self.counted)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(ninth decile - first) / median, of all samples: below 0.1 on a quiet machine."""
        if len(self.seconds) < 2:
            return 0.0
        deciles = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return (deciles[-1] - deciles[0]) / statistics.median(self.seconds)

    def fields(self) -> dict[str, float | int]:
        return {
            "ms": self.median * 1e3,
            "min_ms": self.minimum * 1e3,
            "spread": self.spread,
            "samples": len(self.seconds),
            "disturbed": sum(self.disturbed),
        }


QUIET_SWITCHES = 20
PATIENCE = 120  # seconds, after which one counted round has to do: torch's bf16 products take minutes without AVX-512


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Time the contestants, one after the other in every round, so that a noisy neighbour meets them all.

    ``rounds`` rounds after ``warm_up`` that do not count; fewer of either, at least one, once `PATIENCE` is at an end.
    """
    start = time.perf_counter()
    seconds = {name: [] for name in contestants}
    disturbed = {name: [] for name in contestants}
    while warm_up + rounds > 0:
        for name, run in contestants.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            taken = seconds_of(run)
            if warm_up <= 0:
                switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
                seconds[name].append(taken)
                disturbed[name].append(switches > QUIET_SWITCHES * taken)
        hurry = time.perf_counter() - start > PATIENCE
        if warm_up > 0:
            warm_up = 0 if hurry else warm_up - 1
        else:
            rounds = 0 if hurry else rounds - 1
    return {name: Timing(tuple(seconds[name]), tuple(disturbed[name])) for name in contestants}


def machine() -> dict[str, str | int]:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def save(name: str, result: dict) -> Path:
    """Write ``results/{name}.json`` with the machine and versions next to the figures."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return file


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
