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
    ends = added if shared else None, residual, norm, 1e-6
    total, normed = triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, name, *ends)
    wanted = experts.experts(x, indices, weights, *layer.stacks, name)
    wanted = residual + (wanted + added if shared else wanted)
    assert torch.equal(total, wanted)
    torch.testing.assert_close(normed, reference.rms_norm(wanted, norm, 1e-6), atol=2e-2, rtol=1e-2)


def test_shapes_that_do_not_fit_are_refused():
    layer, (x, indices, weights) = Layer("bf16", 64, 128), routed(3, 128)
    ends = x[:2], x, torch.ones(128).bfloat16(), 1e-6
    with pytest.raises(ValueError, match="one shape"):
        triton.experts_and_norm.cuda(x, indices, weights, *layer.stacks, "bf16", *ends)
