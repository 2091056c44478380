"""Four-bit weights next to FP8's of the same shape: linear layers and layers of routed experts, each instruction set."""

import argparse
import ctypes
import itertools

import torch
from cpu_ops import COPIES, FEW, SHAPE, on, random_fp8, repeat
from cpu_readers import Readers, race, relative_error, row

from modeling_deepseek_moe.ops import _native, block_fp8, four_bit
from modeling_deepseek_moe.ops._structs import NESTED, Nested
from modeling_deepseek_moe.ops.experts import cpu as experts
from modeling_deepseek_moe.ops.four_bit import cpu

KINDS = ("int4", "nf4", "nf4_nested", "mxfp4")
ROWS = (1, 4, 512)
HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6
FP8 = "FP8"


def random_codes(kind: str, shape: tuple[int, int]):
    """Random codes, and scales as of normal weights with σ = 0.02: their bytes are as good as real ones'."""
    name, (rows, columns) = kind.removesuffix(NESTED), shape
    groups = columns // four_bit.KINDS[name].group
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.rand(rows, groups) * 0.02 + 0.04
    if name == "int4":
        return codes, (scales / 7.5).to(torch.bfloat16)
    if name == "mxfp4":
        return codes, torch.full((rows, groups), 121, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return codes, four_bit.nest(scales) if kind.endswith(NESTED) else scales


def nbytes(codes: torch.Tensor, scales) -> int:
    return codes.nbytes + sum(part.nbytes for part in cpu.parts_of(scales))


def measure(options: argparse.Namespace) -> dict:
    readers, found = Readers(), []
    weights = {FP8: [random_fp8(SHAPE) for _ in range(COPIES)]}
    # as many bytes: they rotate beyond the caches too
    weights |= {kind: [random_codes(kind, SHAPE) for _ in range(2 * COPIES)] for kind in KINDS}
    isas = _native.instruction_sets()[1:] or _native.instruction_sets()
    for rows in ROWS:
        for isa in isas:
            found += linears(weights, isa, rows, options, readers)
    layers = {kind: layer(kind) for kind in (FP8, *KINDS)}
    for tokens in (1, 512):
        for isa in isas:
            found += layers_of_experts(layers, isa, tokens, options, readers)
    return {"rows": found, "errors": errors()}


def linears(weights: dict, isa: str, rows: int, options, readers: Readers) -> list[dict]:
    case = {"case": f"linear {SHAPE[0]}×{SHAPE[1]}, {rows} row{'s' * (rows > 1)}, {isa}", "threads": options.threads}
    x = torch.randn(rows, SHAPE[1], dtype=torch.bfloat16)
    contestants, sizes = {}, {}
    for kind, matrices in weights.items():
        calls, turn = (len(matrices) if rows <= FEW else 1), itertools.cycle(matrices)
        run = product(kind)
        contestants[kind] = lambda calls=calls, turn=turn, run=run: on(isa, repeat, calls, lambda: run(x, *next(turn)))
        sizes[kind] = calls, calls * nbytes(*matrices[0])
    rounds = options.rounds * 4 if rows <= FEW else max(3, options.rounds // 2)
    return figures(case, contestants, sizes, rounds, rows, 2 * rows * SHAPE[0] * SHAPE[1], readers)


def product(kind: str):
    if kind == FP8:
        return block_fp8.linear
    name = kind.removesuffix(NESTED)
    return lambda x, codes, scales: cpu.linear(x, codes, cpu.parts_of(scales), None, name)


def figures(case, contestants, sizes, rounds: int, tokens: int, flops: int, readers: Readers) -> list[dict]:
    """A row for each contestant; ratio: FP8's time for one call over its own."""
    few = tokens <= FEW
    times, bandwidth = race(contestants, rounds, readers if few else None)
    once = {name: times[name].median / sizes[name][0] for name in contestants}
    found = []
    for name in contestants:
        calls, size = sizes[name]
        found.append(row(case, name, times[name], size if few else 0, bandwidth, 0 if few else calls * flops))
        found[-1] |= {"ratio": once[FP8] / once[name], "us_a_call": once[name] * 1e6}
    return found


def layer(kind: str):
    """The addresses of 64 experts, and what keeps them."""
    table, kept = torch.zeros(EXPERTS, 3, 2, dtype=torch.int64), []
    for expert, part in itertools.product(range(EXPERTS), range(3)):
        shape = (HIDDEN, WIDTH) if part == 2 else (WIDTH, HIDDEN)
        codes, scales = random_fp8(shape) if kind == FP8 else random_codes(kind, shape)
        record = Nested.of(scales) if kind.endswith(NESTED) else None
        address = scales.data_ptr() if record is None else ctypes.addressof(record)
        table[expert, part] = torch.tensor([codes.data_ptr(), address])
        kept.append((codes, scales, record))
    return table, kept


def layers_of_experts(layers: dict, isa: str, tokens: int, options, readers: Readers) -> list[dict]:
    name = f"{EXPERTS} experts {HIDDEN}×{WIDTH}, top-{TOP_K}, {tokens} token{'s' * (tokens > 1)}, {isa}"
    case = {"case": name, "threads": options.threads}
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
    routes = itertools.cycle([torch.rand(tokens, EXPERTS).topk(TOP_K).indices for _ in range(16)])
    weights = torch.rand(tokens, TOP_K) / TOP_K
    contestants, sizes = {}, {}
    for kind, (table, kept) in layers.items():
        four = None if kind == FP8 else kind
        dtype = kept[0][0].dtype
        calls = 1 if tokens > 1 else 4 if four is None else 8
        contestants[kind] = lambda calls=calls, table=table, dtype=dtype, four=four: on(
            isa, repeat, calls, lambda: experts.routed(x, next(routes), weights, table, WIDTH, dtype, four)
        )
        used = TOP_K if tokens == 1 else EXPERTS
        sizes[kind] = calls, calls * used * sum(nbytes(*each[:2]) for each in kept[:3])
    rounds = options.rounds * 4 if tokens == 1 else max(3, options.rounds // 2)
    return figures(case, contestants, sizes, rounds, tokens, 6 * tokens * TOP_K * HIDDEN * WIDTH, readers)


def errors() -> list[dict]:
    """Relative error against fp64 on the exact weights. bf16 output alone costs 1.6e-3."""
    found = []
    for kind in KINDS:
        name = kind.removesuffix(NESTED)
        codes, scales = random_codes(kind, (512, 2048))
        exact = four_bit.decode(codes, scales, torch.float32, (1, four_bit.KINDS[name].group), kind=name).double()
        for rows in (1, 4, 64):
            x = torch.randn(rows, 2048, dtype=torch.bfloat16)
            fields = {"kind": kind, "rows": rows}
            for isa in _native.instruction_sets()[1:]:
                given = on(isa, product(kind), x, codes, scales)
                fields[isa] = relative_error(given, x.double() @ exact.T)
            found.append(fields)
    return found
