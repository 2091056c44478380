"""An adapter's matrices next to those of experts, in the engine's one call and in torch's, against the definition in fp64."""

import pytest
import torch
from engine_cases import every_isa, needs_engine

from modeling_deepseek_moe import DeepseekV3Config
from modeling_deepseek_moe.formats import by_name
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.ops.experts import Copies, LowRank, Pair, cpu, operands
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts

pytestmark = needs_engine
EXPERTS = 16


def layer(kind, hidden, width):
    config = DeepseekV3Config(hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=EXPERTS)
    config._experts_implementation = None
    if kind == "bf16":
        module = DeepseekExperts(config).bfloat16().requires_grad_(False)
        for stack in module.parameters():
            stack.normal_(std=0.1)
        return module
    weight_format = by_name(kind)
    module = StackedQuantizedExperts(config, weight_format)
    for index in range(EXPERTS):
        for matrix in module.matrices(index).values():
            values = torch.randn(weight_format.value_shape(matrix.codes.shape)) * 0.1
            for own, value in zip(matrix, weight_format.quantize(values), strict=True):
                own.copy_(value)
    return module


def pair(outputs, inputs, rank):
    a, b = torch.randn(EXPERTS, rank, inputs) * 0.1, torch.randn(outputs, rank, EXPERTS) * 0.1
    return (Pair(a, b.permute(2, 0, 1), 0.5, Copies()),) if rank else ()


def defined(module, hidden, indices, weights, low_rank, width):
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, chosen in enumerate(indices.tolist()):
        for place, expert in enumerate(chosen):
            if expert >= EXPERTS:
                continue
            if isinstance(module, DeepseekExperts):
                gate_up, down = module.gate_up_proj[expert].double(), module.down_proj[expert].double()
            else:
                decode = module.weight_format.dequantize
                matrices = [decode(*matrix, torch.float32).double() for matrix in module.matrices(expert).values()]
                gate_up, down = torch.cat(matrices[:2]), matrices[2]
            for own in low_rank.gate_up:
                gate_up = gate_up + own.scale * own.b[expert].double() @ own.a[expert].double()
            for own in low_rank.down:
                down = down + own.scale * own.b[expert].double() @ own.a[expert].double()
            inner = gate_up @ hidden[token].double()
            swiglu = torch.nn.functional.silu(inner[:width]) * inner[width:]
            out[token] += weights[token, place].double() * (down @ swiglu)
    return out


SIZES = [((4, 2), 128, 64), ((16, 0), 200, 130), ((0, 33), 136, 256)]
CASES = [(kind, *sizes) for kind in ("fp8", "bf16") for sizes in SIZES]
CASES += [(kind, (4, 2), 128, 64) for kind in ("int4", "mxfp4")]


@every_isa
@pytest.mark.parametrize(("kind", "ranks", "hidden", "width"), CASES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@torch.no_grad()
def test_low_rank_products_in_every_way(tokens, ranks, hidden, width, kind, isa):
    torch.manual_seed(0)
    module = layer(kind, hidden, width)
    low_rank = LowRank(pair(2 * width, hidden, ranks[0]), pair(hidden, width, ranks[1]))
    x = torch.randn(tokens, hidden).bfloat16()
    indices = torch.rand(tokens, EXPERTS + 1).topk(3).indices  # the last is no expert of this rank
    weights = torch.rand(tokens, 3)
    want = defined(module, x, indices, weights, low_rank, width)
    bare = defined(module, x, indices, weights, LowRank(), width)
    assert (want - bare).norm() > 0.05 * want.norm()
    with use_backend(isa):
        found = module(x, indices, weights, low_rank=low_rank)
    assert found.dtype == torch.bfloat16
    assert (found.double() - want).norm() < 0.012 * want.norm()
    if kind == "fp8":
        with use_backend("reference"):
            exact = module(x.float(), indices, weights, low_rank=low_rank)
        assert (exact.double() - want).norm() < 1e-5 * want.norm()


@torch.no_grad()
def test_a_long_prompt_is_computed_a_part_at_a_time(monkeypatch):
    torch.manual_seed(0)
    module, x = layer("bf16", 128, 64), torch.randn(40, 128).bfloat16()
    low_rank = LowRank(pair(128, 128, 4), pair(128, 64, 4))
    given = torch.rand(40, EXPERTS).topk(3).indices, torch.rand(40, 3)
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", 60_000)  # of 16 tokens
    wanted = defined(module, x, *given, low_rank, 64)
    assert (module(x, *given, low_rank=low_rank).double() - wanted).norm() < 0.012 * wanted.norm()


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("matrix", ["a", "b"])
def test_a_prompt_sees_whatever_was_written(matrix, made_in):
    """Also what has no version: by way of ``.data``, to tensors of inference mode, next to what few tokens look at."""
    with made_in():
        torch.manual_seed(0)
        module, x = layer("fp8", 128, 64), torch.randn(40, 128).bfloat16()
        low_rank = LowRank(pair(128, 128, 4), pair(128, 64, 4))
        given = torch.rand(40, EXPERTS).topk(3).indices, torch.rand(40, 3)
        before = module(x, *given, low_rank=low_rank)
        written = getattr(low_rank.gate_up[0], matrix).data
        (written[:, 0] if matrix == "a" else written[..., 0]).mul_(-20)
        found = module(x, *given, low_rank=low_rank)
        wanted = defined(module, x, *given, low_rank, 64)
    assert (found.double() - wanted).norm() < 0.012 * wanted.norm()
    assert (before.double() - wanted).norm() > 0.3 * wanted.norm()


def test_matrices_of_other_experts_are_refused():
    module = layer("fp8", 128, 64)
    weights = operands(module)
    x, indices = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    bad = torch.zeros(EXPERTS, 2, 128, dtype=torch.bfloat16), torch.zeros(EXPERTS, 2, 64, dtype=torch.bfloat16), 1.0
    with pytest.raises(ValueError, match=r"found \[16, 2, 64\].*for gate_up, wanted contiguous \[16, 2, 128\]"):
        cpu.run_low_rank(x, indices, torch.ones(1, 1), weights.addresses, 64, weights.dtype, None, bad, None)
