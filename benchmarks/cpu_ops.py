"""FP8 and bf16 linear layers: one row, a few, many; every instruction set; compared with torch's bf16 linear."""

import argparse
import itertools
import math

import common
import torch
import torch.nn.functional as F
from cpu_readers import Readers, race, relative_error, row

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops import _native, block_fp8
from modeling_deepseek_moe.ops.linear import linear

SHAPE = (4096, 7168)
HEAD = (102400, 2048)
ROWS = (1, 4, 512)
FEW = 16  # rows up to which bytes count, and beyond which operations do
COPIES = -(-common.beyond_caches(160 << 20) // math.prod(SHAPE))  # of FP8
TORCH = "torch bf16"
GEMM_SIZE = 2048


def random_fp8(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of normal weights with σ = 0.02, as `block_fp8.quantize` makes them."""
    return block_fp8.quantize(torch.randn(shape, dtype=torch.bfloat16) * 0.02)


def on(isa: str, function, *arguments):
    with use_backend(f"cpu:{isa}"):
        return function(*arguments)


def repeat(calls: int, function) -> None:
    for _ in range(calls):
        function()


def measure(options: argparse.Namespace) -> dict:
    weights = [random_fp8(SHAPE) for _ in range(COPIES)]
    dense = [block_fp8.dequantize(*weight, torch.bfloat16) for weight in weights[: COPIES // 2]]
    heads = torch.randn(HEAD, dtype=torch.bfloat16)
    readers = Readers()
    counts = [options.threads] if options.quick else sorted({1, options.threads})
    found = []
    for threads in counts:
        torch.set_num_threads(threads)
        for rows in ROWS:
            found += fp8_linear(weights, dense, rows, threads, options.rounds * 4, readers)
        found += head(heads, threads, options.rounds * 2, readers)
        found += gemm(threads, options.rounds)
    return {"rows": found, "errors": errors(weights[0], dense[0])}


def fp8_linear(weights, dense, rows: int, threads: int, rounds: int, readers: Readers) -> list[dict]:
    case = {"case": f"FP8 linear {SHAPE[0]}×{SHAPE[1]}, {rows} row{'s' * (rows > 1)}", "threads": threads}
    x = torch.randn(rows, SHAPE[1], dtype=torch.bfloat16)
    turn, turn_dense = itertools.cycle(weights), itertools.cycle(dense)
    # a sample of few rows is as many calls as there are weights: about as many bytes as the readers read
    calls = COPIES if rows <= FEW else 1
    contestants = {TORCH: lambda: repeat(calls, lambda: F.linear(x, next(turn_dense)))}
    for isa in _native.instruction_sets():
        if isa == "baseline" and rows > FEW:
            continue  # seconds per call, and no one's choice
        contestants[f"FP8 {isa}"] = lambda isa=isa: on(isa, repeat, calls, lambda: block_fp8.linear(x, *next(turn)))
    times, bandwidth = race(contestants, rounds if rows <= FEW else max(3, rounds // 2), readers)
    found = list(readers.rows(case, times)) if rows == 1 else []
    for name in contestants:
        nbytes = calls * (dense[0].nbytes if name == TORCH else sum(part.nbytes for part in weights[0]))
        if rows > FEW:
            found.append(row(case, name, times[name], flops=2 * rows * SHAPE[0] * SHAPE[1]))
        else:
            found.append(row(case, name, times[name], nbytes, bandwidth))
        found[-1]["ratio"] = times[TORCH].median / times[name].median
    return found


def head(weight, threads: int, rounds: int, readers: Readers) -> list[dict]:
    case = {"case": f"bf16 linear {HEAD[0]}×{HEAD[1]}, 1 row", "threads": threads}
    x = torch.randn(1, HEAD[1], dtype=torch.bfloat16)
    contestants = {TORCH: lambda: F.linear(x, weight)}
    for isa in _native.instruction_sets():
        contestants[f"bf16 {isa}"] = lambda isa=isa: on(isa, linear, x, weight)
    times, bandwidth = race(contestants, rounds, readers)
    found = [row(case, name, times[name], weight.nbytes, bandwidth) for name in contestants]
    for fields in found:
        fields["ratio"] = times[TORCH].median / times[fields["contestant"]].median
    return found


def gemm(threads: int, rounds: int) -> list[dict]:
    products = {f"torch {str(dtype)[6:]}": matrix_product(dtype) for dtype in (torch.bfloat16, torch.float32)}
    times, _ = race(products, rounds, None)
    case = {"case": f"matrix product {GEMM_SIZE}³", "threads": threads}
    return [row(case, name, times[name], flops=2 * GEMM_SIZE**3) for name in products]


def matrix_product(dtype: torch.dtype):
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype) for _ in range(2))
    return lambda: F.linear(a, b)


def errors(weight, dense) -> list[dict]:
    """Relative error against fp64 on the exact FP8 weights. bf16 output alone costs 1.6e-3."""
    found = []
    exact_weight = block_fp8.dequantize(*weight, torch.float32).double()
    for rows in ROWS:
        x = torch.randn(rows, SHAPE[1], dtype=torch.bfloat16)
        exact = x.double() @ exact_weight.T
        fields = {"rows": rows, TORCH: relative_error(F.linear(x, dense), exact)}
        for isa in _native.instruction_sets():
            if isa == "baseline" and rows > FEW:
                continue
            fields[f"FP8 {isa}"] = relative_error(on(isa, block_fp8.linear, x, *weight), exact)
            fields[f"{isa} in fp32"] = relative_error(on(isa, block_fp8.linear, x.float(), *weight), exact)
        found.append(fields)
    return found
