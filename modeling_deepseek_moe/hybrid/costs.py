"""What a layer's experts cost where: on the CPU, which reads them, or on the accelerator, to which they are copied first."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from modeling_deepseek_moe.machine import measure_read_bandwidth

CPU, DEVICE = "cpu", "gpu"


@dataclass(frozen=True)
class Rates:
    """Per second: bytes that the CPU reads from memory and operations that it does, bytes to the accelerator, its operations."""

    cpu_bytes: float
    cpu_operations: float
    link_bytes: float
    device_operations: float


@dataclass(frozen=True)
class Layer:
    """The routed experts of one layer: how many, how many per token, and of one expert bytes and values."""

    num_experts: int
    top_k: int
    expert_bytes: int
    expert_values: int

    def hit(self, tokens: int) -> float:
        """Experts that ``tokens`` tokens want together, if routing is uniform."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


def seconds_on_cpu(layer: Layer, tokens: int, rates: Rates) -> float:
    """Reading and computing overlap: the slower of them counts."""
    operations = 2 * layer.expert_values * layer.top_k * tokens
    return max(layer.hit(tokens) * layer.expert_bytes / rates.cpu_bytes, operations / rates.cpu_operations)


def seconds_on_device(layer: Layer, tokens: int, rates: Rates, held: float = 0.0) -> float:
    """Copies, of all but the share ``held`` of the experts that is there already, overlap with computing."""
    operations = 2 * layer.expert_values * layer.top_k * tokens
    copied = layer.hit(tokens) * layer.expert_bytes * (1 - held)
    return max(copied / rates.link_bytes, operations / rates.device_operations)


def faster(layer: Layer, tokens: int, rates: Rates, held: float = 0.0) -> str:
    """`CPU` or `DEVICE`: where a layer's experts take less time. Where both take the same nothing is copied."""
    on_device = seconds_on_device(layer, tokens, rates, held)
    return DEVICE if on_device < seconds_on_cpu(layer, tokens, rates) else CPU


def measure_rates(device: torch.device, seconds: float = 0.2) -> Rates:
    """A probe of this machine, about four times ``seconds``."""
    size, width = 64 << 20, 2048
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda" and torch.cuda.is_available())
    target = torch.empty(size, dtype=torch.uint8, device=device)
    link = size / _fastest(lambda: target.copy_(source, non_blocking=True), device, seconds)

    def operations(where: torch.device, rows: int) -> float:
        left, right = (
            torch.ones(shape, dtype=torch.bfloat16, device=where) for shape in ((rows, width), (width, width))
        )
        return 2 * rows * width**2 / _fastest(lambda: left @ right, where, seconds)

    return Rates(
        cpu_bytes=measure_read_bandwidth(seconds=seconds).bytes_per_second,
        cpu_operations=operations(torch.device("cpu"), 256),
        link_bytes=link,
        device_operations=operations(device, 2048 if device.type != "cpu" else 256),
    )


def _fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
