"""The parts of `gpu.py`: limits of the card, parity of the kernels, each kernel, whole models, a training step."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import gpu_hybrid
import gpu_models
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.formats import by_name
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts

FORMATS = ("fp8", "int4", "mxfp4", "nf4", "fp4", "bf16")
# experts, experts of a token, hidden size, width of an expert
V2_LITE, V3 = (64, 6, 2048, 1408), (256, 8, 7168, 2048)
BYTES = {
    "fp8": 1.0,
    "int4": 0.5 + 2 / 32,
    "mxfp4": 0.5 + 1 / 32,
    "nf4": 0.5 + 4 / 64,
    "fp4": 0.5 + 4 / 64,
    "bf16": 2.0,
}


def seconds_of(call: Callable[[int], object], repeats: int = 20, rounds: int = 5) -> float:
    """Of one call on the card, in a CUDA graph of ``repeats`` of them: the median of rounds. ``call`` gets its number."""
    for number in range(3):
        call(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(repeats):
            call(number)
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


def limits(device: torch.device) -> dict:
    """Bandwidth of a read, of a copy and from the host; bf16 products; what a kernel costs as a node of a graph."""
    data = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    half = data.numel() // 2
    read, copy = data.view(torch.int64), seconds_of(lambda _: data[:half].copy_(data[half:]), 4)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    one, host = torch.zeros(1, device=device), torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    start = time.perf_counter()
    for _ in range(2000):
        one.add_(1)
    launch = (time.perf_counter() - start) / 2000
    return {
        "read_TBps": data.nbytes / seconds_of(lambda _: read.sum(), 4) / 1e12,
        "copy_TBps": data.nbytes / copy / 1e12,
        "from_host_GBps": host.nbytes
        / seconds_of(lambda _: data[: host.numel()].copy_(host, non_blocking=True), 4)
        / 1e9,
        "bf16_TFLOPs": 2 * 8192**3 / seconds_of(lambda _: a @ b, 4) / 1e12,
        "launch_us": launch * 1e6,
        "node_us": seconds_of(lambda _: one.add_(1), 200) * 1e6,
    }


def experts(name: str, shape: tuple[int, int, int, int], device: torch.device) -> torch.nn.Module:
    """A layer of experts in a format, with random codes, subnormal ones too, and scales near those of trained weights."""
    count, _, size, width = shape
    config = SimpleNamespace(n_routed_experts=count, moe_intermediate_size=width, hidden_size=size, hidden_act="silu")
    config.num_local_experts, config._experts_implementation = count, None
    with torch.device(device):
        module = DeepseekExperts(config) if name == "bf16" else StackedQuantizedExperts(config, by_name(name))
    gpu_models.fill(module)
    return module.eval().requires_grad_(False)


def routed(shape: tuple[int, int, int, int], tokens: int, device: torch.device):
    count, top_k, size, _ = shape
    x = torch.randn((tokens, size), dtype=torch.bfloat16, device=device)
    return (
        x,
        torch.rand((tokens, count), device=device).topk(top_k).indices,
        torch.rand((tokens, top_k), device=device),
    )


@torch.no_grad()
def parity(device: torch.device, backend: str = "triton") -> dict:
    """Relative difference of each format's experts, and of the shipped model's logits, from the reference on the card."""
    found = {}
    for name in FORMATS:
        for tokens in (1, 7, 40, 300):
            shape = (8, 3, 384, 256)
            module, given = experts(name, shape, device), routed(shape, tokens, device)
            with dsm.use_backend("reference"):
                wanted = module(*given).double()
            with dsm.use_backend(backend):
                got = module(*given).double()
            found[f"experts {name} {tokens}"] = ((got - wanted).norm() / wanted.norm()).item()
    found["tiny model, prefill and 8 steps"] = tiny_model(device)
    return {"relative difference from the reference": found, "largest": max(found.values())}


@torch.no_grad()
def tiny_model(device: torch.device) -> float:
    """Relative difference of the logits of the shipped model, of a prompt and of steps after it."""
    model = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), dtype=torch.bfloat16, device_map={"": device})
    tokens = torch.arange(1, 65, device=device).view(2, 32)
    logits = {}
    for way in ("reference", "auto"):
        with dsm.use_backend(way):
            out = model(tokens[:, :24], use_cache=True)
            parts = [out.logits]
            for place in range(24, 32):
                out = model(tokens[:, place : place + 1], **{gpu_models.CACHE: out[gpu_models.CACHE]}, use_cache=True)
                parts.append(out.logits)
            logits[way] = torch.cat(parts, 1).double()
    difference = logits["auto"] - logits["reference"]
    return (difference.norm() / logits["reference"].norm()).item()


@contextmanager
def freed() -> Iterator[None]:
    """What was allocated inside is given back."""
    try:
        yield
    finally:
        torch.cuda.empty_cache()


@torch.no_grad()
def decode_experts(device: torch.device) -> dict:
    """GB/s of weights that experts of few tokens take, each call with other experts."""
    rows = []
    for title, shape in (("V2-Lite", V2_LITE), ("V3", V3)):
        for name in FORMATS[:-1] if shape == V3 else FORMATS:
            with freed():
                module = experts(name, shape, device)
                for tokens in (1, 2, 4, 8, 16, 64):
                    calls = [routed(shape, tokens, device) for _ in range(10)]
                    seconds = seconds_of(lambda i, m=module, c=calls: m(*c[i % 10]), 10, 3)
                    hit = statistics.mean(len(indices.unique()) for _, indices, _ in calls)
                    moved = hit * 3 * shape[2] * shape[3] * BYTES[name]
                    rows.append(
                        {
                            "shape": title,
                            "format": name,
                            "tokens": tokens,
                            "us": seconds * 1e6,
                            "GBps": moved / seconds / 1e9,
                        }
                    )
                del module
    return {"rows": rows}


@torch.no_grad()
def many_tokens(device: torch.device) -> dict:
    """TFLOP/s of experts on prompts: this package's way, and torch's grouped products in bf16 on the same shapes."""
    rows = []
    for tokens in (512, 4096):
        for name in ("fp8", "bf16"):
            with freed():
                module, given = experts(name, V2_LITE, device), routed(V2_LITE, tokens, device)
                seconds = seconds_of(lambda _, m=module, g=given: m(*g), 3, 3)
                flops = 6 * tokens * V2_LITE[1] * V2_LITE[2] * V2_LITE[3]
                rows.append({"format": name, "tokens": tokens, "ms": seconds * 1e3, "TFLOPs": flops / seconds / 1e12})
                del module
        with freed():
            a = torch.randn((tokens * V2_LITE[1], V2_LITE[2]), dtype=torch.bfloat16, device=device)
            b = torch.randn((V2_LITE[0], V2_LITE[2], 2 * V2_LITE[3]), dtype=torch.bfloat16, device=device)
            ends = torch.arange(1, V2_LITE[0] + 1, device=device, dtype=torch.int32) * (len(a) // V2_LITE[0])
            seconds = seconds_of(partial(lambda a, b, ends, _: F.grouped_mm(a, b, offs=ends), a, b, ends), 3, 3)
            flops = 2 * a.shape[0] * b.shape[1] * b.shape[2]
            rows.append({"format": "grouped_mm, gate and up", "tokens": tokens, "TFLOPs": flops / seconds / 1e12})
    return {"rows": rows}


PARTS = (
    ("limits", 20, limits),
    ("parity", 45, parity),
    ("decode_experts", 60, decode_experts),
    ("attention", 40, gpu_models.attention),
    ("end_to_end", 115, gpu_models.end_to_end),
    ("many_tokens", 25, many_tokens),
    ("plain_transformers", 50, gpu_models.plain_transformers),
    ("hybrid", 50, gpu_hybrid.hybrid),
    ("training", 50, gpu_models.training),
    ("trace", 10, gpu_models.trace),
)
