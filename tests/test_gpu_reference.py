"""What is done on a GPU in plain torch, computed on the CPU: experts without a look at the routing, weights that are kept,
values that were lost in FP8 training, and a static cache whose length is not waited for."""

import copy

import pytest
import torch
from releases import SHAPES
from torch import nn
from transformers import StaticCache

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.cache import prepare_cache
from modeling_deepseek_moe.moe.balance import expert_load
from modeling_deepseek_moe.ops import _operands, block_fp8
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.ops.experts import run_experts, unsorted
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.training.fp8 import OptimizerSteps
from modeling_deepseek_moe.training.fp8_functions import Fp8Weight

FP8 = formats.by_name("fp8")


def stacks(form="fp8") -> StackedQuantizedExperts:
    experts = StackedQuantizedExperts(SHAPES["v3"](), formats.by_name(form))
    seed = torch.Generator().manual_seed(0)
    for index in range(experts.num_experts):
        for name, matrix in experts.matrices(index).items():
            shape = (32, 64) if name != "down_proj" else (64, 32)
            codes, scales = experts.weight_format.quantize(torch.randn(shape, generator=seed) / 8)
            matrix.codes.view(torch.uint8).copy_(codes.view(torch.uint8))
            matrix.scales.copy_(scales)
    return experts


@pytest.mark.parametrize("tokens", [1, 3, 40], ids=["one", "by slots", "by experts"])
@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize("served_elsewhere", [False, True])
def test_experts_without_a_look_at_the_routing(form, tokens, served_elsewhere):
    experts, seed = stacks(form), torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 64, generator=seed)
    indices = torch.stack([torch.randperm(16, generator=seed)[:4] for _ in range(tokens)])
    weights = torch.rand(tokens, 4, generator=seed)
    if served_elsewhere:
        indices[:, 1] = experts.num_experts  # an index past the last

    def expert(index, x):
        return experts.expert(experts.matrices(index).values(), x)

    with use_backend("reference"), torch.no_grad():
        wanted = run_experts(hidden, indices, weights, expert, experts.num_experts)
        found = unsorted.run(experts, hidden, indices, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_they_are_for_few_tokens_elsewhere_without_gradients():
    weights = torch.empty(4, 2, device="meta")
    assert unsorted.may_run(torch.empty(4, 8, device="meta"), weights)
    assert not unsorted.may_run(torch.empty(4, 8), weights)
    assert not unsorted.may_run(torch.empty(unsorted.MOST_TOKENS + 1, 8, device="meta"), weights)
    assert not unsorted.may_run(torch.empty(4, 8, device="meta", requires_grad=True), weights)
    with torch.no_grad():
        assert unsorted.may_run(torch.empty(4, 8, device="meta", requires_grad=True), weights)


def test_a_dequantised_weight_is_kept_until_it_is_another():
    layer = QuantizedLinear(64, 32, False, FP8, device="meta")
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    first = _operands.kept_weight_of(layer, like)
    assert first.shape == (32, 64) and first.dtype == torch.bfloat16
    assert _operands.kept_weight_of(layer, like) is first
    assert _operands.kept_weight_of(layer, like.float()).dtype == torch.float32
    second = _operands.kept_weight_of(layer, like)
    with torch.no_grad():
        layer.weight.copy_(torch.empty_like(layer.weight))
    third = _operands.kept_weight_of(layer, like)
    assert third is not second
    layer.weight.data = torch.empty_like(layer.weight)
    assert _operands.kept_weight_of(layer, like) is not third
    assert _operands.KEPT not in {k for k, v in copy.deepcopy(layer).__dict__.items() if v is not None}


def test_on_a_cpu_nothing_is_kept():
    layer = QuantizedLinear(64, 32, False, FP8)
    _operands.kept_weight_of(layer, torch.empty(0))
    assert _operands.KEPT not in layer.__dict__


def test_a_lost_weight_is_told_once_a_step():
    weight = torch.randn(256, 128)
    weight[130, 5] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf"):
        block_fp8.quantize(weight, checked=False)  # on a CPU, where looking costs nothing
    codes, scale = block_fp8.reference.quantize(weight, (128, 128), False, checked=False)
    assert scale.isnan().tolist() == [[False], [True]]
    assert torch.equal(codes[:128].float(), block_fp8.quantize(weight[:128])[0].float())

    steps = OptimizerSteps()
    steps.watch([Fp8Weight(codes, scale)])  # of the CPU: it was looked at
    steps.check()
    steps._lost = [scale.isnan().any(), torch.tensor(False)]  # as of a device
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    with pytest.raises(ValueError, match="NaN or Inf"):
        torch.optim.SGD([parameter]).step()
    steps.check()


def test_a_token_does_not_ask_a_device_how_far_a_static_cache_is_filled():
    config = SHAPES["v3"]()
    cache = StaticCache(config, max_cache_len=8)
    assert prepare_cache(cache, config, 1) == 0
    for index in range(config.num_hidden_layers):
        cache.update(torch.zeros(1, 1, 3, 32, device="meta"), torch.zeros(1, 1, 3, 8, device="meta"), index)
    assert prepare_cache(cache, config, 1) is None


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])])
def test_loads_as_bincount_has_them(mask):
    indices = torch.tensor([[0, 3], [3, 1], [3, 2]])
    kept = indices if mask is None else indices[mask]
    assert torch.equal(expert_load(indices, 5, mask), torch.bincount(kept.flatten(), minlength=5))
