"""Hooks of torch's kinds are called as often as in plain transformers on the same weights, and what they return counts."""

import pytest
import torch
import transformers
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from transformers import AutoModelForCausalLM, DynamicCache, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME

pytestmark = pytest.mark.tools

LINEAR = "model.layers.2.self_attn.o_proj"
IDS = torch.arange(20, 44)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    dequantize = FineGrainedFP8Config(dequantize=True)
    AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), quantization_config=dequantize).save_pretrained(path)
    return path


@pytest.fixture(params=["float32", "bfloat16"])
def models(request, folder):
    config = transformers.DeepseekV3Config.from_pretrained(folder)
    plain = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).eval(), plain.eval()


@torch.no_grad()
def decode(model, steps=4) -> torch.Tensor:
    """Logits of a prompt, then of a token at a time."""
    cache = DynamicCache(config=model.config)
    found = [model(IDS[:, :-steps], **{CACHE_NAME: cache}).logits[:, -1]]
    for step in range(IDS.shape[1] - steps, IDS.shape[1]):
        found.append(model(IDS[:, step : step + 1], **{CACHE_NAME: cache}).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.act_fn", "model.layers.2.mlp.shared_experts.act_fn", "model.layers.2.mlp.experts.act_fn"],
)
def test_the_activations_of_neurons_can_be_switched_off(models, name):
    found, calls = [], []
    for model in models:
        before, seen = decode(model), []

        def switch_off(module, args, out, seen=seen):
            seen.append(len(out))
            return out * 0

        handle = model.get_submodule(name).register_forward_hook(switch_off)
        off = decode(model)
        handle.remove()
        assert torch.equal(decode(model), before)
        assert not torch.equal(off, before)
        found.append(off)
        calls.append(bool(seen))
    assert calls == [True, True]
    if found[0].dtype == torch.float32:  # bf16 rounds by as much as one layer's shared experts are worth
        torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_a_hook_on_every_module_is_called_for_every_layer(models):
    kinds = {
        "self_attn.o_proj",
        "self_attn.kv_a_proj_with_mqa",
        "mlp.shared_experts.up_proj",
        "mlp",
        "input_layernorm",
    }
    counts = []
    for model in models:
        names = {
            module: f"{index}.{kind}"
            for index, layer in enumerate(model.model.layers[:5])
            for kind in kinds
            if (module := dict(layer.named_modules()).get(kind)) is not None
        }
        seen = dict.fromkeys(names.values(), 0)

        def count(module, args, out, names=names, seen=seen):
            if module in names:
                seen[names[module]] += 1

        handle = register_module_forward_hook(count)
        try:
            decode(model)
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] and set(counts[0].values()) == {5}


@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_can_be_looked_at(models, everywhere):
    found = []
    for model in models:
        layer, seen = model.get_submodule(LINEAR), []

        def look(module, gradients, outputs, layer=layer, seen=seen):
            if module is layer:
                seen.append(outputs[0].float())

        handle = register_module_full_backward_hook(look) if everywhere else layer.register_full_backward_hook(look)
        try:
            model(IDS, labels=IDS).loss.backward()
        finally:
            handle.remove()
        (gradient,) = seen
        found.append(gradient)
    assert torch.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.9
