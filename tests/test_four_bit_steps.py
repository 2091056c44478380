"""Whole models of four-bit weights on the CPU engine: native where they can be, with the bits of their layers, mixed with others."""

import copy
import statistics
from functools import cache

import pytest
import torch
from engine_cases import by_layers_alone, distance, every_isa, needs_engine
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import formats, use_backend
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

pytestmark = needs_engine
KINDS = ("int4", "nf4", "fp4", "mxfp4")
IDS = torch.arange(10, 26)[None]


@pytest.fixture(scope="module")
def plain():
    """The package's trained checkpoint in bf16."""
    model = AutoModelForCausalLM.from_pretrained(
        dsm.tiny_checkpoint(), quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    return model.eval()


def quantised(model, kind_of):
    """The model with the layers' linears and experts in the formats that ``kind_of(name)`` says; and with their values."""
    model, exact = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in list(model.model.layers.named_modules()):
        row = kind_of(name) and formats.by_name(kind_of(name))
        parent, _, child = name.rpartition(".")
        if row is None:
            continue
        if type(module) is torch.nn.Linear:
            made = QuantizedLinear(module.in_features, module.out_features, False, row)
            made.weight.data, made.scale.data = row.quantize(module.weight.data)
            exact.model.layers.get_submodule(name).weight.data = made.dequantized(torch.bfloat16)
        elif name.endswith("mlp.experts"):
            made = StackedQuantizedExperts(model.config, row)
            own = exact.model.layers.get_submodule(name)
            for index in range(made.num_experts):
                width = made.intermediate_dim
                weights = own.gate_up_proj[index, :width], own.gate_up_proj[index, width:], own.down_proj[index]
                for matrix, weight in zip(made.matrices(index).values(), weights, strict=True):
                    codes, scales = row.quantize(weight.data)
                    matrix.codes.copy_(codes)
                    matrix.scales.copy_(scales)
                    weight.data.copy_(row.dequantize(codes, scales, torch.bfloat16))
        else:
            continue
        setattr(model.model.layers.get_submodule(parent), child, made)
    return model.eval(), exact.eval()


@pytest.fixture(scope="module")
def uniform(plain):
    """`quantised` to one format throughout; both stay what they are but for the dtype of the second, which takes no bits from it."""
    return cache(lambda kind: quantised(plain, lambda name: kind))


@torch.no_grad()
def steps(model, count=8) -> torch.Tensor:
    """Logits of a prompt, then of one token after the other."""
    found = [(out := model(IDS, use_cache=True)).logits[:, -1]]
    for step in range(count):
        out = model(torch.full((1, 1), 5 + step), cache=out.cache, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def typical(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The median step's distance: where two experts are as good as equal, rounding chooses, by the machine.

    Another expert took a step 0.3 away, in bf16 by the reference too; logits of something else are 1 and more away.
    """
    steps_apart = [distance(one, other) for one, other in zip(found, wanted, strict=True)]
    assert max(steps_apart) < 0.5
    return statistics.median(steps_apart)


@torch.no_grad()
def by_modules(model, count=8) -> torch.Tensor:
    """The same without a cache: a prompt that grows, in which no layers are one call."""
    ids, found = IDS, []
    for step in range(count + 1):
        found.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat((ids, torch.full((1, 1), 5 + step)), 1)
    return torch.stack(found)


def natives(model) -> str:
    return str(model.engine_report())


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_step_is_native(uniform, kind):
    model, exact = uniform(kind)
    assert "1 call of the engine for the layers of a token" in natives(model)
    with use_backend("reference"):
        wanted = steps(exact.float())
    found = steps(model)
    # bf16 activations against fp32 ones, of the same weights
    with use_backend("reference"):
        theirs = steps(exact.bfloat16())
    assert typical(found, wanted) < 1.6 * typical(theirs, wanted) + 1e-3


@every_isa
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_bits_of_its_layers(uniform, kind, isa, monkeypatch):
    """And so those of a model whose experts are streamed, which are called as the module that they are."""
    model, _ = uniform(kind)
    with use_backend(isa):
        found = steps(model, 3)
        by_layers_alone(monkeypatch)
        assert torch.equal(found, steps(model, 3))


@every_isa
def test_every_instruction_set_is_as_near_as_the_reference(uniform, isa):
    model, exact = uniform("nf4")
    with use_backend("reference"):
        wanted, theirs = steps(exact.float()), steps(model)
    with use_backend(isa):
        assert typical(steps(model), wanted) < 1.5 * typical(theirs, wanted) + 1e-3


MIXED = {
    "experts": "int4",
    "o_proj": "nf4",
    "kv_b_proj": "mxfp4",
    "q_a_proj": "fp8",
    "shared_experts.gate_proj": "fp4",
    "shared_experts.up_proj": "nf4",
}


def test_formats_mix_within_a_layer(plain):
    """What is not of one kind, such as projections that share a packing, runs by its modules, and nothing is refused."""

    def kind_of(name):
        return next((kind for end, kind in MIXED.items() if name.endswith(end)), None)

    model, exact = quantised(plain, kind_of)
    text = natives(model)
    assert "needs projections of one dtype" in text and "needs weights of one dtype" in text
    with use_backend("reference"):
        wanted, theirs = steps(exact.float()), steps(model)
    assert typical(steps(model), wanted) < 1.5 * typical(theirs, wanted) + 1e-3


def test_fp8_layers_with_four_bit_experts_are_one_call(plain):
    model, exact = quantised(plain, lambda name: "int4" if name.endswith("experts") else "fp8")
    assert "1 call of the engine for the layers of a token" in natives(model)
    with use_backend("reference"):
        wanted, theirs = steps(exact.float()), steps(model)
    assert typical(steps(model), wanted) < 1.5 * typical(theirs, wanted) + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_growing_prompt_and_steps_agree_in_fp32(plain, kind):
    model, _ = quantised(copy.deepcopy(plain).float(), lambda name: kind)
    assert distance(steps(model), by_modules(model)) < 2e-5
    with use_backend("reference"):
        wanted = by_modules(model)
        assert distance(by_modules(model), wanted) == 0
    assert distance(by_modules(model), wanted) < 2e-5


def test_a_changed_weight_counts_from_the_next_token(plain):
    model, _ = quantised(plain, lambda name: "nf4")
    before = steps(model)
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    after = steps(model)
    assert not torch.equal(before, after)
    with use_backend("reference"):
        assert distance(after, steps(model)) < 0.1
