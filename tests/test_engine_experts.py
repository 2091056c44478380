"""Routed experts and SwiGLU layers on the CPU engine, against expert by expert in fp64."""

import pytest
import torch
from engine_calls import differing, run
from engine_cases import FP8, Experts, distance, every_isa, guarded, needs_engine, random_routing
from releases import same_bits

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops.experts import cpu

pytestmark = needs_engine

KINDS = pytest.mark.parametrize("kind", [FP8, torch.bfloat16], ids=["fp8", "bf16"])
ACTIVATIONS = pytest.mark.parametrize("dtype", _native.ACTIVATIONS, ids=str)
# Widths and hidden sizes with ragged chunks, blocks and panels; few tokens per expert, many, both, and over 512.
SIZES = [(1, 3, 5), (1, 64, 64), (2, 130, 65), (5, 200, 191), (17, 128, 129), (40, 257, 70), (75, 300, 128)]
# Two products and SwiGLU, summed in fp32; bf16 kernels round what is between the products to bf16 (2^-9), as torch's do
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def check(home: Experts, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, hidden).to(dtype)
    indices, weights = random_routing(tokens, 2, len(home.down), seed=tokens)
    wanted = home.reference(x, indices, weights, torch.float64)
    routed = cpu.routed(x, indices, weights, home.addresses(), home.width, home.down.dtype)
    assert routed.dtype == dtype and distance(routed, wanted) <= TOLERANCES[dtype]
    stacked = cpu.stacked(x, indices, weights, home.gate_up, home.down, *home.stacked_scales)
    assert same_bits(stacked, routed)
    (gate, gate_scale), (up, up_scale), (down, down_scale) = home.matrices(0)
    one = cpu.swiglu(x, gate, up, down, gate_scale, up_scale, down_scale)
    everywhere = torch.zeros((tokens, 1), dtype=torch.int64)
    wanted = home.reference(x, everywhere, torch.ones(tokens, 1), torch.float64)
    assert one.dtype == dtype and distance(one, wanted) <= TOLERANCES[dtype]


@every_isa
@ACTIVATIONS
@KINDS
def test_experts(kind, dtype, isa):
    with use_backend(isa):
        for tokens, hidden, width in SIZES:
            check(Experts.random(kind, 4, hidden, width), tokens, hidden, dtype)


@every_isa
@KINDS
def test_many_tokens_of_one_expert(kind, isa):
    """Tokens are taken 512 at a time."""
    with use_backend(isa):
        check(Experts.random(kind, 1, 100, 70), 1100, 100, torch.bfloat16)


@every_isa
@KINDS
@pytest.mark.parametrize("indices", [[3, 1, 2], [3, 3, 5], [1, 3, 3], [3] * 6 + [5, 6]], ids=str)
def test_one_token(indices, kind, isa):
    """It is packed once for all of its experts, unless one has it several times, which may be many."""
    home, x = Experts.random(kind, 7, 200, 191), torch.randn(1, 200).bfloat16()
    indices, weights = torch.tensor([indices]), torch.rand(1, len(indices))
    with use_backend(isa):
        found = cpu.routed(x, indices, weights, home.addresses(), home.width, home.down.dtype)
    assert distance(found, home.reference(x, indices, weights, torch.float64)) <= TOLERANCES[torch.bfloat16]


@every_isa
@KINDS
def test_kept_buffers_change_no_bit(kind, isa):
    """The buffers of many tokens stay from call to call, with what the last call left in them: here NaN."""
    tokens, hidden, width = 1100, 1000, 70
    home = Experts.random(kind, 2, hidden, width)
    x = torch.randn(tokens, hidden).bfloat16()
    indices, weights = random_routing(tokens, 2, 2)
    table = home.addresses()
    with use_backend(isa):
        wanted = cpu.routed(x, indices, weights, table, width, kind)
        spoiled = torch.full((tokens + 300, hidden), torch.nan).bfloat16()
        assert cpu.routed(spoiled, *random_routing(len(spoiled), 2, 2), table, width, kind).isnan().any()
        assert same_bits(cpu.routed(x, indices, weights, table, width, kind), wanted)


@every_isa
@KINDS
def test_parts_are_added_in_order(kind, isa, monkeypatch):
    """Tokens a part at a time, and experts a group at a time, give the bits of one call."""
    home = Experts.random(kind, 6, 150, 90)
    x = torch.randn(50, 150).bfloat16()
    indices, weights = random_routing(50, 3, 6)
    table = home.addresses()
    with use_backend(isa):
        whole = torch.zeros(50, 150)
        cpu.accumulate(whole, x, indices, weights, table, 90, kind)
        groups = torch.zeros(50, 150)
        for first in range(0, 6, 2):
            part = torch.zeros_like(table)
            part[first : first + 2] = table[first : first + 2]
            cpu.accumulate(groups, x, indices, weights, part, 90, kind)
        assert same_bits(groups, whole)
        monkeypatch.setattr(cpu, "WORKSPACE_BYTES", 7 * 4 * 3 * (150 + 90))  # 7 tokens: each still has its few kernels
        again = torch.zeros(50, 150)
        cpu.accumulate(again, x, indices, weights, table, 90, kind)
        assert distance(again, whole) <= TOLERANCES[torch.bfloat16]


@every_isa
@KINDS
def test_slots_of_no_expert(kind, isa):
    """Indices beyond the experts, below zero, and all of them."""
    home = Experts.random(kind, 3, 70, 50)
    x, weights = torch.randn(4, 70), torch.rand(4, 2)
    indices = torch.tensor([[0, 3], [-1, 2], [2**62, -(2**62)], [5, 1]])
    inside = (indices >= 0) & (indices < 3)
    wanted = home.reference(x, indices.where(inside, 3), weights, torch.float64)
    with use_backend(isa):
        found = cpu.routed(x, indices, weights, home.addresses(), 50, kind)
        assert not found[2].any() and distance(found, wanted) <= TOLERANCES[torch.float32]
        assert not cpu.routed(x, indices.fill_(3), weights, home.addresses(), 50, kind).any()


@every_isa
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@KINDS
def test_reads_nothing_beyond_its_tensors(kind, at_end, isa):
    """Everything lies against memory that must not be touched. A crash of this test is its failure."""
    with use_backend(isa):
        for tokens, hidden, width in ((1, 1, 1), (2, 5, 3), (3, 63, 65), (16, 129, 70), (17, 131, 191), (40, 65, 63)):
            home = Experts.random(kind, 2, hidden, width)
            home.gate_up, home.down = guarded(home.gate_up, at_end), guarded(home.down, at_end)
            if home.scales is not None:
                home.scales = tuple(guarded(scale, at_end) for scale in home.scales)
            indices, weights = (guarded(part, at_end) for part in random_routing(tokens, 2, 2))
            table = guarded(home.addresses(), at_end)
            x = torch.randn(tokens, hidden)
            wanted = home.reference(x.bfloat16(), indices, weights, torch.float64)
            for dtype in _native.ACTIVATIONS:
                found = cpu.routed(guarded(x.to(dtype), at_end), indices, weights, table, width, kind)
                assert (found - wanted).norm() <= 1e-2 * wanted.norm() + 1e-6


@KINDS
def test_inputs_as_they_come(kind):
    """Strided activations, weights and scales, scales and routing weights in bf16."""
    home = Experts.random(kind, 3, 200, 150)
    x = torch.randn(200, 7).bfloat16().T
    indices, weights = random_routing(7, 2, 3)
    scales = home.stacked_scales if home.scales is None else [s.bfloat16().float() for s in home.stacked_scales]
    straight = x.contiguous(), indices, weights.bfloat16().float(), home.gate_up, home.down, *scales

    def strided(tensor):
        if tensor is None:
            return None
        if tensor.dtype == FP8:
            return torch.stack((tensor.view(torch.uint8),) * 2, -1)[..., 0].view(FP8)
        return torch.stack((tensor,) * 2, -1)[..., 0]

    crooked = [x, strided(indices), strided(weights.bfloat16()), strided(home.gate_up), strided(home.down)]
    crooked += [None if scale is None else strided(scale.bfloat16()) for scale in scales]
    results = [run({"stacked": (cpu.stacked, arguments)}) for arguments in (straight, crooked)]
    assert not differing(*results)
    matrices = [strided(part) for matrix in home.matrices(2) for part in matrix]
    swiglu = [cpu.swiglu(x, *m[0::2], *m[1::2]) for m in (matrices, [p for m in home.matrices(2) for p in m])]
    assert same_bits(*swiglu)
    assert cpu.swiglu(x.reshape(7, 1, 200)[:0], *matrices[0::2], *matrices[1::2]).shape == (0, 1, 200)


@KINDS
def test_nothing_to_do(kind):
    """No tokens, no experts per token, no experts."""
    home = Experts.random(kind, 2, 70, 50)
    for tokens, top_k, count in ((0, 2, 2), (3, 0, 2), (3, 2, 0)):
        x = torch.randn(tokens, 70)
        indices, weights = random_routing(tokens, top_k, 2)
        stacks = (None if part is None else part[:count] for part in (home.gate_up, home.down, *home.stacked_scales))
        for found in (
            cpu.routed(x, indices, weights, home.addresses()[:count], 50, kind),
            cpu.stacked(x, indices, weights, *stacks),
        ):
            assert found.shape == (tokens, 70) and not found.any()
