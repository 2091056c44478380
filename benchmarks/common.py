"""What the benchmarks share: the machine's own limits, interleaved timing, and result files."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def read_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes/s that all of torch's threads read from memory: the best of several sums over a buffer beyond the caches."""
    data = torch.ones(megabytes << 20, dtype=torch.uint8).view(torch.int64)
    return data.nbytes / min(_seconds(data.sum) for _ in range(repeats))


def gemm_flops(dtype: torch.dtype = torch.bfloat16, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of torch's square matrix product: the best of several."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(repeats))


def interleave(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, one after the other in every round, so that a noisy neighbour meets them all."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(_seconds(run))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, str | int]:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def save(name: str, result: dict) -> Path:
    """Write ``results/{name}.json`` with the machine and versions beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return file


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
