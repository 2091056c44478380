"""Layers of routed experts: FP8 on the engine compared with every way of transformers in bf16, on the same weights."""

import argparse
import itertools
from types import SimpleNamespace

import torch
import transformers
from cpu_ops import on, random_fp8, repeat
from cpu_readers import Readers, race, relative_error, row
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.ops import _native, block_fp8
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts

HIDDEN, WIDTH, EXPERTS = 2048, 1408, 64
TINY = (64, 32)
CASES = ((6, 1), (8, 1), (6, 512), (8, 512))  # top-k, tokens
LAYERS = 3
CALLS = 4
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
LARGEST_GATHER = 2 << 30  # batched_mm copies the weights of every token's experts


def layers(hidden: int, width: int, count: int) -> list[SimpleNamespace]:
    """``count`` times: FP8 experts, and transformers' experts with the same values in bf16."""
    fields = {"hidden_size": hidden, "moe_intermediate_size": width, "n_routed_experts": EXPERTS}
    made = []
    for _ in range(count):
        ours = StackedQuantizedExperts(dsm.DeepseekV3Config(**fields), FP8)
        for index in range(EXPERTS):
            for matrix in ours.matrices(index).values():
                # normal weights, as in a release: few subnormal codes, over which some CPUs stumble
                codes, scale = random_fp8(tuple(matrix.codes.shape))
                matrix.codes.copy_(codes)
                matrix.scales.copy_(scale)
        with torch.device("meta"):
            theirs = DeepseekV3Experts(transformers.DeepseekV3Config(**fields))
        gate_up, down = torch.empty(EXPERTS, 2 * width, hidden, dtype=torch.bfloat16), []
        for index in range(EXPERTS):
            gate, up, last = (
                block_fp8.dequantize(*matrix, torch.bfloat16) for matrix in ours.matrices(index).values()
            )
            gate_up[index, :width], gate_up[index, width:] = gate, up
            down.append(last)
        theirs.gate_up_proj, theirs.down_proj = (
            torch.nn.Parameter(stack, requires_grad=False) for stack in (gate_up, torch.stack(down))
        )
        made.append(SimpleNamespace(ours=ours, theirs=theirs, config=theirs.config))
    return made


def routes(tokens: int, top_k: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Different experts for every token, at random, and their weights."""
    return [
        (torch.rand(tokens, EXPERTS).topk(top_k).indices, torch.rand(tokens, top_k, dtype=torch.bfloat16) / top_k)
        for _ in range(count)
    ]


def run_theirs(layer: SimpleNamespace, implementation: str, x: torch.Tensor, route) -> torch.Tensor:
    layer.config._experts_implementation = implementation
    return layer.theirs(x, *route)


def gathered_bytes(tokens: int, top_k: int, hidden: int, width: int) -> int:
    return tokens * top_k * 3 * hidden * width * 2


def measure(options: argparse.Namespace) -> dict:
    readers = Readers()
    made = layers(HIDDEN, WIDTH, 1 if options.quick else LAYERS)
    found, agreement = [], []
    for top_k, tokens in CASES:
        rounds = options.rounds * 4 if tokens == 1 else max(3, options.rounds // 2)
        found += contest(made, top_k, tokens, options.threads, rounds, readers)
    agreement.append(agree(made[0]))
    tiny = layers(*TINY, LAYERS)
    found += contest(tiny, 6, 1, options.threads, options.rounds * 20, None, TINY)
    return {"rows": found, "agreement": agreement, "hidden": HIDDEN, "width": WIDTH, "experts": EXPERTS}


def contest(
    made: list, top_k: int, tokens: int, threads: int, rounds: int, readers: Readers | None, dims=(HIDDEN, WIDTH)
) -> list[dict]:
    case = {
        "case": f"{EXPERTS} experts {dims[0]}×{dims[1]}, top-{top_k}, {tokens} token{'s' * (tokens > 1)}",
        "threads": threads,
    }
    x = torch.randn(tokens, dims[0], dtype=torch.bfloat16)
    turn = itertools.cycle(itertools.product(routes(tokens, top_k, 16), made))
    calls = CALLS if tokens == 1 else 1  # of a sample: one alone is short next to the readers that take turns with it
    contestants = {}
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or gathered_bytes(tokens, top_k, *dims) < LARGEST_GATHER:
            contestants[f"transformers {name}"] = lambda name=name: repeat(calls, lambda: next_theirs(turn, name, x))
    for isa in _native.instruction_sets()[1:] or _native.instruction_sets():
        contestants[f"FP8 {isa}"] = lambda isa=isa: on(isa, repeat, calls, lambda: next_ours(turn, x))
    times, bandwidth = race(contestants, rounds, readers)
    best = min(times[name].median for name in contestants if name.startswith("transformers"))
    hit = top_k if tokens == 1 else EXPERTS
    found = list(readers.rows(case, times)) if readers and tokens == 1 and top_k == CASES[0][0] else []
    for name in contestants:
        nbytes = calls * hit * 3 * dims[0] * dims[1] * (2 if name.startswith("transformers") else 1)
        count = tokens == 1 and readers is not None
        flops = 0 if tokens == 1 else 6 * tokens * top_k * dims[0] * dims[1]
        found.append(row(case, name, times[name], nbytes if count else 0, bandwidth, flops))
        found[-1] |= {"ratio": best / times[name].median, "us_a_call": times[name].median / calls * 1e6}
    return found


def next_theirs(turn, name: str, x: torch.Tensor) -> torch.Tensor:
    route, layer = next(turn)
    return run_theirs(layer, name, x, route)


def next_ours(turn, x: torch.Tensor) -> torch.Tensor:
    route, layer = next(turn)
    return layer.ours(x, *route)


def agree(layer: SimpleNamespace) -> dict:
    """Relative errors of both against the layer in fp32, 16 tokens."""
    x, (route,) = torch.randn(16, HIDDEN, dtype=torch.bfloat16), routes(16, 6, 1)
    with dsm.use_backend("reference"):
        exact = layer.ours(x.float(), *route).double()
    found = {"tokens": 16, "transformers eager": relative_error(run_theirs(layer, "eager", x, route), exact)}
    for isa in _native.instruction_sets():
        found[f"FP8 {isa}"] = relative_error(on(isa, layer.ours, x, *route), exact)
    return found
