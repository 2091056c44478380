"""Doors of `torch.export` and `torch.compile`, next to plain transformers on the same weights.

| door | plain | here |
|---|---|---|
| `torch.export`, with and without a cache | works; transformers' static recipe fails | the same; the recipe is refused by name |
| `torch.compile` of a model that has not run | works | works |
"""

import io

import pytest
import torch
from releases import two_layer_releases
from test_doors_generation import PLAIN, load, prompts
from transformers import DynamicCache, StaticCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM, export_with_dynamic_cache

from modeling_deepseek_moe.compat import CACHE_NAME

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_layer_releases(tmp_path_factory)


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


class _StaticStep(torch.nn.Module):
    """transformers' recipe for a static cache, but the cache takes its shapes from the model."""

    def __init__(self, model, length):
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        with torch.no_grad():
            model(torch.tensor([[3]]), use_cache=True, **{CACHE_NAME: self.cache})
        for index, layer in enumerate(self.cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                self.register_buffer(f"{name}_{index}", getattr(layer, name), persistent=False)

    def forward(self, input_ids, cache_position):
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(cache_position[0])
        return self.model(input_ids, use_cache=True, **{CACHE_NAME: self.cache}).logits


def exported(module, inputs, **settings):
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, **settings)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in operators if name.startswith("deepseek_moe")}  # it runs where this package is not
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(("kind", "strict"), [("v3", False), ("v2", True)])
@pytest.mark.slow
def test_export_of_any_length(folder, kind, strict):
    model, plain = load(folder(kind)), load(folder(kind), cls=PLAIN[kind])
    (ids,) = torch.tensor([prompts(7)])
    lengths = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}}
    program = exported(_Logits(model), {"input_ids": ids}, dynamic_shapes=lengths, strict=strict)
    for length in (2, 7, 33):
        ids = torch.tensor(prompts(length))
        with torch.no_grad():
            torch.testing.assert_close(program(input_ids=ids), plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_export_of_bf16_that_has_run(folder):
    """What the engine remembers of a run, addresses among it, stays out of the program."""
    model, plain = load(folder("v3"), torch.bfloat16), load(folder("v3"), torch.bfloat16, cls=PLAIN["v3"])
    ids, others = torch.tensor(prompts(7, 7))[:, None]
    with torch.no_grad():
        model(ids)
        program = exported(_Logits(model), {"input_ids": ids}, strict=False)
        found, wanted = program(input_ids=others).float(), plain(others).logits.float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.slow
def test_export_with_a_static_cache(folder):
    model, plain = load(folder("v3")), load(folder("v3"), cls=PLAIN["v3"])
    (ids,) = torch.tensor([prompts(9)])
    one = {"input_ids": ids[:, :1], "cache_position": torch.tensor([0])}
    program = exported(_StaticStep(model, 32), one, strict=False)
    with torch.no_grad():
        steps = [program(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, dim=1), plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_export_with_a_dynamic_cache(folder):
    model, plain = load(folder("v3")), load(folder("v3"), cls=PLAIN["v3"])
    ids, others = torch.tensor(prompts(7, 7))[:, None]
    program = export_with_dynamic_cache(model, ids, torch.ones_like(ids)).module()
    held = {CACHE_NAME: DynamicCache(config=model.config)}
    with torch.no_grad():
        found = program(input_ids=others, attention_mask=torch.ones_like(ids), use_cache=True, **held)
        torch.testing.assert_close(found.logits, plain(others).logits, rtol=1e-4, atol=1e-4)


def test_the_recipe_that_lays_out_expanded_keys_is_refused(folder):
    model = load(folder("v3"))
    model.generation_config.cache_implementation = "static"
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32)
    with pytest.raises(ValueError, match="only latents are cached"):
        recipe.export(input_ids=torch.tensor(prompts(7)), strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_fp8_experts_is_refused(folder, strict):
    model = load(folder("v3", fp8=True), torch.bfloat16)
    with pytest.raises(Exception, match="dequantize=True"):
        exported(_Logits(model), {"input_ids": torch.tensor(prompts(7))}, strict=strict)


@pytest.mark.parametrize(
    ("kind", "fp8", "backend"),
    [("v3", False, "eager"), ("v3", False, "aot_eager"), ("v2", False, "eager"), ("v3", True, "aot_eager")],
)
@pytest.mark.slow
def test_cold_compile(folder, kind, fp8, backend):
    torch._dynamo.reset()
    ids = torch.tensor(prompts(11))
    model = load(folder(kind, fp8), torch.bfloat16)
    held = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=32)}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        prompt = compiled(ids[:, :10], use_cache=True, **held).logits
        token = compiled(ids[:, 10:], use_cache=True, **held).logits
        wanted = load(folder(kind, fp8), torch.bfloat16)(ids, use_cache=False).logits.float()
    found = torch.cat((prompt, token), dim=1).float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_cold_compile_of_one_token(folder):
    torch._dynamo.reset()
    ids = torch.tensor(prompts(1))
    model = load(folder("v3"), torch.bfloat16)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits.float()
        wanted = load(folder("v3"), torch.bfloat16)(ids, use_cache=False).logits.float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()
