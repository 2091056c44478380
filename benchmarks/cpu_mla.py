"""Absorbed attention of one new token: the engine compared with the same computation in torch's own operations."""

import argparse
import itertools

import common
import torch
from cpu_ops import GEMM_SIZE, matrix_product, on, random_fp8
from cpu_readers import Readers, race, relative_error, row

from modeling_deepseek_moe.ops import _native, block_fp8
from modeling_deepseek_moe.ops.absorbed_attention import cpu, reference

NOPE, ROPE, RANK, VALUE = 128, 64, 512, 128
CASES = ((16, 128), (16, 1024), (16, 8192), (128, 1024), (128, 8192))  # heads, cached tokens
LARGE = 200 << 20  # bytes of caches and weights over which the rounds rotate


def measure(options: argparse.Namespace) -> dict:
    readers, found, agreement = Readers(), [], []
    # without AVX-512, fp32 is ten times faster
    dtype = max((torch.bfloat16, torch.float32), key=lambda dtype: common.gemm_flops(dtype, repeats=2))
    product = matrix_product(dtype)
    for heads, length in CASES:
        found += contest(heads, length, options, readers, product)
    for heads in (16, 128):
        agreement.append(agree(heads, 1024))
    return {"rows": found, "agreement": agreement}


def contest(heads: int, length: int, options: argparse.Namespace, readers: Readers, gemm) -> list[dict]:
    case = {"case": f"MLA, {heads} heads, {length} tokens", "threads": options.threads}
    nbytes = heads * (NOPE + VALUE) * RANK + length * (RANK + ROPE) * 2
    flops = 2 * heads * (length * (2 * RANK + ROPE) + (NOPE + VALUE) * RANK)
    inputs = itertools.cycle([make(heads, length, seed) for seed in range(max(2, min(16, LARGE // nbytes)))])
    contestants = {"torch bf16": lambda: by_torch(next(inputs)), "matrix product": gemm}
    for isa in _native.instruction_sets()[1:] or _native.instruction_sets():
        contestants[f"FP8 {isa}"] = lambda isa=isa: on(isa, cpu.decode, *next(inputs)[0])
    times, bandwidth = race(contestants, options.rounds * 3, readers)
    peak = 2 * GEMM_SIZE**3 / times["matrix product"].median
    found = []
    for name in contestants:
        if name == "matrix product":
            found.append(
                row({**case, "case": f"matrix product {GEMM_SIZE}³"}, name, times[name], flops=2 * GEMM_SIZE**3)
            )
            continue
        found.append(row(case, name, times[name], nbytes, bandwidth, flops))
        found[-1]["ratio"] = times["torch bf16"].median / times[name].median
        # whichever takes longer is the limit: reading everything once, or the operations at the rate of a large product
        found[-1]["share_of_limit"] = max(nbytes / bandwidth, flops / peak) / times[name].median
    return found


def make(heads: int, length: int, seed: int) -> tuple[tuple, tuple]:
    """Arguments of the engine, and W_UK and W_UV in bf16."""
    torch.manual_seed(seed)
    queries = [torch.randn(1, heads, 1, size, dtype=torch.bfloat16) for size in (NOPE, ROPE)]
    caches = [torch.randn(1, 1, length, size, dtype=torch.bfloat16) for size in (RANK, ROPE)]
    weight, scale = random_fp8((heads * (NOPE + VALUE), RANK))
    dense = block_fp8.dequantize(weight, scale, torch.bfloat16).view(heads, -1, RANK)
    return (*queries, *caches, None, weight, scale, (NOPE + ROPE) ** -0.5), dense.split((NOPE, VALUE), dim=1)


def by_torch(inputs: tuple[tuple, tuple]) -> torch.Tensor:
    (*tensors, mask, _, _, scaling), (w_uk, w_uv) = inputs
    return reference.absorbed_attention(*tensors, mask, w_uk, w_uv, scaling)[0]


def agree(heads: int, length: int) -> dict:
    """Relative errors against fp64."""
    inputs = make(heads, length, 0)
    (*tensors, mask, _, _, scaling), dense = inputs
    exact = reference.absorbed_attention(*(t.double() for t in tensors), mask, *(w.double() for w in dense), scaling)[
        0
    ]
    found = {"heads": heads, "tokens": length, "torch bf16": relative_error(by_torch(inputs), exact)}
    for isa in _native.instruction_sets():
        found[f"FP8 {isa}"] = relative_error(on(isa, cpu.decode, *inputs[0]), exact)
    return found
