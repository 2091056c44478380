"""One call of every operator of the CPU engine, on inputs of a given size and magnitude: what several tests run over.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width.
"""

import ctypes
from collections.abc import Callable, Iterable

import torch
from engine_cases import FP8, Experts, random_fp8, random_routing

from modeling_deepseek_moe.ops import _native, four_bit
from modeling_deepseek_moe.ops._latents import DTYPES as LATENT_DTYPES
from modeling_deepseek_moe.ops._structs import NESTED, Nested
from modeling_deepseek_moe.ops.absorbed_attention import cpu as attention
from modeling_deepseek_moe.ops.block_fp8 import cpu as fp8
from modeling_deepseek_moe.ops.experts import cpu as experts
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit_cpu
from modeling_deepseek_moe.ops.four_bit.reference import KINDS
from modeling_deepseek_moe.ops.indexer import cpu as indexer
from modeling_deepseek_moe.ops.linear import cpu as bf16
from modeling_deepseek_moe.ops.mla_project import cpu as projection
from modeling_deepseek_moe.ops.moe import cpu as moe
from modeling_deepseek_moe.ops.rms_norm import cpu as norm
from modeling_deepseek_moe.ops.routing import cpu as routing
from modeling_deepseek_moe.ops.sparse_attention import cpu as sparse

Call = tuple[Callable, tuple]


# One with each packing, of which one has nested scales: the others differ from them in a table.
TWO_KINDS = ("int4", "nf4" + NESTED)


def every_call(
    tokens: int,
    hidden: int,
    width: int,
    magnitude: float = 1.0,
    kept: list | None = None,
    kinds: Iterable[str] = TWO_KINDS,
) -> dict:
    """``{name: (operator, arguments)}``, in every dtype; addresses point into what is added to ``kept``.

    Args:
        kinds: of four-bit codes.
    """
    generator = torch.Generator().manual_seed(tokens * 1000 + hidden + width)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    codes, scale = random_fp8((width, hidden), seed=hidden)
    scale = scale * magnitude
    weight = random(width, hidden).bfloat16()
    homes = {dtype: Experts.random(dtype, 3, hidden, width) for dtype in (FP8, torch.bfloat16)}
    chosen = random_routing(tokens, 2, 3, seed=tokens)
    if kept is not None:
        kept.extend(homes.values())
    calls = routing_calls(random, tokens, magnitude)
    for dtype in _native.ACTIVATIONS:
        name = str(dtype).removeprefix("torch.")
        x = (random(tokens, hidden) * magnitude).to(dtype)
        bias = (random(width) * magnitude).to(dtype)
        calls[f"fp8-linear-{name}"] = fp8.linear, (x, codes, scale, bias)
        calls[f"bf16-linear-{name}"] = bf16.linear, (x, weight, bias)
        calls[f"rms-norm-{name}"] = norm.rms_norm, (x, random(hidden).to(dtype), 1e-6)
        calls[f"dequantize-{name}"] = fp8.dequantize, (codes, scale, dtype)
        calls[f"quantize-{name}"] = fp8.quantize, ((random(width, hidden) * magnitude).to(dtype), True, False)
        calls[f"quantize-ue8m0-{name}"] = fp8.quantize, ((random(width, hidden) * magnitude).to(dtype), True, True)
        if dtype in LATENT_DTYPES:
            calls |= choice_calls(random, name, dtype, tokens)
        for kind in homes if dtype in LATENT_DTYPES else ():
            label = f"{'fp8' if kind == FP8 else 'bf16'}-{name}"
            calls |= attention_calls(random, label, kind, dtype, tokens, hidden, magnitude)
        for kind, home in homes.items():
            label = f"{'fp8' if kind == FP8 else 'bf16'}-{name}"
            calls |= expert_calls(random, label, kind, home, x, chosen, with_addresses=kept is not None)
        for kind in kinds:
            calls |= four_bit_calls(random, kind, x, chosen, width, magnitude, kept)
    return calls


def four_bit_calls(random: Callable, kind: str, x, chosen, width: int, magnitude: float, kept: list | None) -> dict:
    """Rows of whole groups, an odd number of them."""
    row, label = kind.removesuffix(NESTED), f"{kind}-{str(x.dtype).removeprefix('torch.')}"
    group = KINDS[row].group
    hidden, inner = (-(-size // group) * group for size in (x.shape[1], width))
    x = torch.cat((x, x.new_ones(len(x), hidden - x.shape[1])), 1)

    def matrix(rows, columns):
        codes, scales = four_bit.encode(random(rows, columns) / columns**0.5, (1, group), kind=row)
        return codes, four_bit.nest(scales) if kind.endswith(NESTED) else scales

    codes, scales = matrix(width, hidden)
    parts = four_bit_cpu.parts_of(scales)
    calls: dict[str, Call] = {
        f"linear-{label}": (four_bit_cpu.linear, (x, codes, parts, random(width).to(x.dtype), row)),
        f"dequantize-{label}": (four_bit_cpu.dequantize, (codes, parts, x.dtype, row)),
    }
    gate, up, down = (matrix(*shape) for shape in ((inner, hidden), (inner, hidden), (hidden, inner)))
    three = [part for _, scales in (gate, up, down) for part in four_bit_cpu.parts_of(scales)]
    calls[f"swiglu-{label}"] = experts.swiglu_four_bit, (x, [gate[0], up[0], down[0]], three, row)
    if x.dtype in LATENT_DTYPES:
        up, up_scales = matrix(4 * 36, hidden)
        shapes = ((2, 4, 1, 16), (2, 4, 1, 8), (2, 1, 30, hidden), (2, 1, 30, 8))
        given = [(random(*shape) * magnitude).to(x.dtype) for shape in shapes]
        parts = four_bit_cpu.parts_of(up_scales)
        calls[f"mla-{label}"] = attention.decode_four_bit, (*given, None, up, parts, row, 0.2)
        calls[f"sparse-{label}"] = sparse.attend_four_bit, (*given, chosen_rows(2, 1, 30), up, parts, row, 0.2)
    if kept is not None:
        table = torch.zeros((3, 3, 2), dtype=torch.int64)
        for expert in range(3):
            for part, shape in enumerate([(inner, hidden), (inner, hidden), (hidden, inner)]):
                codes, scales = matrix(*shape)
                record = Nested.of(scales) if kind.endswith(NESTED) else None
                table[expert, part, 0] = codes.data_ptr()
                table[expert, part, 1] = scales.data_ptr() if record is None else ctypes.addressof(record)
                kept.append((codes, scales, record))
        calls[f"routed-{label}"] = experts.routed, (x, *chosen, table, inner, torch.uint8, kind)
    return calls


def routing_calls(random: Callable, tokens: int, magnitude: float) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    logits, preference = random(tokens, 16) * 3, random(16) * magnitude
    for softmax, few_groups in ((True, False), (False, True)):
        # exponentials of the smallest of them are denormals
        given = logits * 30 if softmax else logits
        bias = preference if few_groups else None
        calls[f"route-{'softmax' if softmax else 'sigmoid'}-bfloat16"] = (
            routing.route,
            (given, bias, *((4, 2) if few_groups else (1, 1)), 6, softmax, few_groups, not softmax, 2.5),
        )
    return calls


def attention_calls(
    random: Callable, label: str, kind: torch.dtype, dtype: torch.dtype, tokens: int, hidden: int, magnitude: float
) -> dict[str, Call]:
    up, up_scale = random_fp8((4 * 36, hidden), seed=hidden + 1)
    up, up_scale = (up, up_scale / 10) if kind == FP8 else (random(4 * 36, hidden).bfloat16(), None)
    shapes = ((2, 4, 1, 16), (2, 4, 1, 8), (2, 1, 30 * tokens, hidden), (2, 1, 30 * tokens, 8))
    queries_and_caches = [(random(*shape) * magnitude).to(dtype) for shape in shapes]
    mask = random(2, 1, 1, 30 * tokens) > -1
    calls: dict[str, Call] = {f"mla-{label}": (attention.decode, (*queries_and_caches, mask, up, up_scale, 0.2))}
    shapes = ((2, 4, 3, 16), (2, 4, 3, 8))
    queries = [(random(*shape) * magnitude).to(dtype) for shape in shapes]
    rows = chosen_rows(2, 3, 30 * tokens)
    calls[f"sparse-{label}"] = sparse.attend, (*queries, *queries_and_caches[2:], rows, up, up_scale, 0.2)
    few = (random(1, min(tokens, 8), hidden) * magnitude).to(dtype)
    angles = random(1, few.shape[1], 8)
    for query, shapes in (
        ("direct", [(3 * 56, hidden), (72 + 16, hidden)]),
        ("compressed", [(130, hidden), (3 * 56, 130), (72 + 16, hidden)]),
    ):
        pairs = [random_fp8(shape, seed=shape[0]) for shape in shapes]
        if kind != FP8:
            pairs = [(random(*shape).bfloat16(), None) for shape in shapes]
        scales = [part * magnitude for _, part in pairs if part is not None]
        sizes = ([130] if len(shapes) == 3 else []) + [72]
        norms = [random(size).to(dtype) for size in sizes]
        parts = [weight for weight, _ in pairs], scales
        calls[f"project-{query}-{label}"] = (
            projection.project,
            (few, angles.cos(), angles.sin(), *parts, norms, [1e-6] * len(norms), 3, 72, True),
        )
    return calls


def choice_calls(random: Callable, label: str, dtype: torch.dtype, tokens: int) -> dict[str, Call]:
    """Of whole numbers, whose scores are the same on every instruction set."""
    length, calls = 40 * tokens, {}
    queries, keys, weights = ((random(*shape) * 2).round() for shape in ((2, 3, 5, 40), (2, length, 40), (2, 3, 5)))
    masks = {"causal": None, "dense": random(2, 1, 3, length) > -1, "added": (random(1, 1, 3, length) * 4).round()}
    for name, mask in masks.items():
        calls[f"index-{name}-{label}"] = indexer.select, (queries.to(dtype), weights, keys.to(dtype), mask, 30)
    return calls


def chosen_rows(batch: int, queries: int, length: int) -> torch.Tensor:
    """Some rows of a cache for each query, fewer for the first."""
    rows = torch.arange(0, length, 2, dtype=torch.int32).repeat(batch, queries, 1)
    rows[:, 0, length // 3 :] = -1
    return rows


def expert_calls(
    random: Callable, label: str, kind: torch.dtype, home: Experts, x: torch.Tensor, chosen, with_addresses: bool
) -> dict[str, Call]:
    hidden, width = home.down.shape[-2:]
    gate_up_scale, down_scale = home.stacked_scales
    (gate, gate_scale), (up, up_scale), (down, row_scale) = home.matrices(1)
    calls: dict[str, Call] = {}
    calls[f"stacked-{label}"] = experts.stacked, (x, *chosen, home.gate_up, home.down, gate_up_scale, down_scale)
    calls[f"swiglu-{label}"] = experts.swiglu, (x, gate, up, down, gate_scale, up_scale, row_scale)
    if with_addresses:
        table = home.addresses()
        calls[f"routed-{label}"] = experts.routed, (x, *chosen, table, width, kind)
        if x.dtype != torch.float16:
            shared = [gate, up, down], [gate_scale, up_scale, row_scale] if kind == FP8 else []
            router = random(3, hidden).bfloat16(), random(3), 1, 1, 2, False, False, True, 2.5
            calls[f"moe-{label}"] = moe.moe, (x[:8], *router, table, [], width, kind, *shared)
    return calls


def run(calls: dict) -> dict[str, list[torch.Tensor]]:
    """What each call returns."""
    results = {}
    with torch.no_grad():
        for name, (function, arguments) in calls.items():
            found = function(*arguments)
            results[name] = list(found) if isinstance(found, tuple) else [found]
    return results


def differing(found: dict, wanted: dict) -> list[str]:
    """The names of the calls whose results are not the same bits."""
    assert found.keys() == wanted.keys()

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        # not by torch, which in a forked process waits for threads that do not exist there
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()

    return [name for name in wanted if not all(same(a, b) for a, b in zip(found[name], wanted[name], strict=True))]
