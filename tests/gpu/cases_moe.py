"""The end of a mixture-of-experts layer in one kernel, to the bit of what its parts give one after the other."""

import pytest
import torch
from gpu.cases_experts import RAGGED, E, Layer, routed

from modeling_deepseek_moe.ops.experts import triton as experts
from modeling_deepseek_moe.ops.moe import triton
from modeling_deepseek_moe.ops.rms_norm import reference


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_sums_and_norm(name, shared):
    width, size = RAGGED[name]
    layer, (x, indices, weights) = Layer(name, width, size), routed(3, size)
    indices[1, 0] = E  # served elsewhere
    seed = torch.Generator().manual_seed(5)
    added, residual = torch.randn((2, 3, size), generator=seed).bfloat16()
    norm = torch.rand(size, generator=seed).bfloat16()
    ends = added if shared else None, residual, norm, 1e-6, []
    total, normed = triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, name, *ends)
    wanted = experts.experts(x, indices, weights, *layer.stacks, name)
    wanted = residual + (wanted + added if shared else wanted)
    assert torch.equal(total, wanted)
    torch.testing.assert_close(normed, reference.rms_norm(wanted, norm, 1e-6), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_shared_experts_join_in(name):
    """Wider than a routed expert, or narrower; to the bit of what they give as an expert of weight 1, rounded."""
    for width in (200,) if name == "fp8" else (56, 200):
        layer, (x, indices, weights) = Layer(name, *RAGGED[name]), routed(2, RAGGED[name][1])
        indices[1, 1] = E
        own = Layer(name, width, RAGGED[name][1])
        matrices = [own.stacks[0][0][:width], own.stacks[0][0][width:], own.stacks[1][0]]
        if name == "fp8":
            rows = own.stacks[2].shape[1] // 2
            matrices += [own.stacks[2][0][:rows], own.stacks[2][0][rows:], own.stacks[3][0]]
        ones = torch.ones(2, 1)
        shared = experts.slot_results(x, torch.zeros((2, 1), dtype=torch.int64), ones, own.stacks, name).bfloat16()
        ends = x, torch.ones(x.shape[1]).bfloat16(), 1e-6
        wanted = triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, name, shared, *ends, [])
        found = triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, name, None, *ends, matrices)
        assert all(map(torch.equal, found, wanted))


def test_shared_experts_that_do_not_fit_are_refused():
    layer, (x, indices, weights) = Layer("bf16", 64, 128), routed(3, 128)
    ends = None, x, torch.ones(128).bfloat16(), 1e-6
    matrices = [torch.zeros(32, 128).bfloat16(), torch.zeros(32, 128).bfloat16(), torch.zeros(128, 16).bfloat16()]
    with pytest.raises(ValueError, match="do not fit bf16 experts of 128"):
        triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, "bf16", *ends, matrices)


def test_shapes_that_do_not_fit_are_refused():
    layer, (x, indices, weights) = Layer("bf16", 64, 128), routed(3, 128)
    ends = x[:2], x, torch.ones(128).bfloat16(), 1e-6, []
    with pytest.raises(ValueError, match="one shape"):
        triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, "bf16", *ends)
