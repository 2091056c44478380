"""`generate` in every mode and cache, padding, packing, compilation, and what the cache holds."""

import pytest
import torch
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_deepseek_moe import attention
from modeling_deepseek_moe.compat import CACHE_NAME

FAMILIES = ("v3", "v2")
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=[(kind, fp8) for kind in FAMILIES for fp8 in (False, True)], ids=str)
def model(request, tmp_path_factory):
    kind, fp8 = request.param
    folder = tmp_path_factory.mktemp(kind)
    write_release(folder, SHAPES[kind](), fp8=fp8)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    write_release(folder, SHAPES["v3"]())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompt(rows=2, length=11):
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, :4] = 0
    return ids.masked_fill(mask == 0, 0), mask


def cacheless(model, ids, mask, steps):
    """Greedy decoding by whole forward passes: no cache, nothing to go wrong."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return ids


@pytest.fixture(scope="module")
def wanted(model):
    return cacheless(model, *prompt(), 24)


@pytest.mark.parametrize("mla_path", ["expanded", "absorbed", None])
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "none"])
def test_caches_agree_with_no_cache(model, wanted, cache, mla_path):
    if cache == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("transformers' offloaded cache moves layers from and to an accelerator")
    ids, mask = prompt()
    settings = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    found = model.generate(ids, attention_mask=mask, mla_path=mla_path, **settings, **GREEDY)
    assert torch.equal(found, wanted)


def test_quantized_cache(float_model):
    pytest.importorskip("optimum.quanto", reason="transformers' quantized cache needs optimum-quanto or hqq")
    ids, mask = prompt()
    cache = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 8}
    settings = {"cache_implementation": "quantized", "cache_config": cache}
    found = float_model.generate(ids, attention_mask=mask, **settings, **GREEDY)
    wanted = float_model.generate(ids, attention_mask=mask, **GREEDY)
    assert found.shape == wanted.shape
    # the prefill attends to what it just computed; later steps see four bits of it
    assert torch.equal(found[:, :12], wanted[:, :12])


def test_each_row_of_a_batch_is_as_if_alone(model):
    ids, mask = prompt()
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, start in ((0, 0), (1, 4)):
        alone = model.generate(ids[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **GREEDY)
        assert torch.equal(alone[0], together[row, start:])


def test_sampling_repeats_by_seed(model):
    ids, mask = prompt()
    settings = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 1.3}
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_assisted_and_prompt_lookup_equal_greedy(model):
    ids, _ = prompt(1)
    ids = torch.cat((ids, ids), dim=1)  # something for the look-up to find
    wanted = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=model, **GREEDY), wanted)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY), wanted)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("given_mask", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences_stay_apart(model, implementation, given_mask, use_cache):
    first, second = prompt(1, 7)[0], prompt(1, 13)[0].flip(1)
    model.set_attn_implementation(implementation)
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    with torch.no_grad():
        wanted = torch.cat((model(first, use_cache=False).logits, model(second, use_cache=False).logits), dim=1)
        settings = {"attention_mask": torch.ones_like(packed)} if given_mask else {}
        out = model(packed, position_ids=positions, use_cache=use_cache, **settings)
        torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-4)
        if use_cache:  # the next token continues the second sequence, and sees nothing of the first
            longer = torch.cat((second, torch.tensor([[9]])), dim=1)
            step = model(torch.tensor([[9]]), position_ids=torch.tensor([[13]]), cache=out[CACHE_NAME]).logits
            torch.testing.assert_close(step, model(longer).logits[:, -1:], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cache_holds_the_latents_and_nothing_else(float_model, cache):
    model = float_model.to(torch.bfloat16)
    config = model.config
    ids, _ = prompt(1, 9)
    held = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=9)
    model(ids, cache=held, use_cache=True)
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert total == 9 * config.num_hidden_layers * width * 2
    model.to(torch.float32)


def test_static_cache_costs_the_length_in_use(float_model, monkeypatch):
    seen = []
    original = attention.DeepseekAttention._absorbed

    def spy(self, q_nope, q_pe, c_kv, *args):
        seen.append(c_kv.shape[2])
        return original(self, q_nope, q_pe, c_kv, *args)

    monkeypatch.setattr(attention.DeepseekAttention, "_absorbed", spy)
    cache = StaticCache(config=float_model.config, max_cache_len=2048)
    ids, _ = prompt(1, 9)
    with torch.no_grad():
        float_model(ids, cache=cache, use_cache=True, mla_path="absorbed")
        float_model(ids[:, :1], cache=cache, use_cache=True, mla_path="absorbed")
    assert set(seen) == {9, 10}


@pytest.mark.slow
def test_compiled_forward_is_one_graph(float_model):
    ids, mask = prompt()
    compiled = torch.compile(float_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for settings in ({}, {"attention_mask": mask}):
            wanted = float_model(ids, use_cache=False, **settings).logits
            found = compiled(ids, use_cache=False, **settings).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.slow
def test_compiled_static_cache_step(float_model, length):
    ids, _ = prompt(1)
    compiled = torch.compile(float_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        caches = [StaticCache(config=float_model.config, max_cache_len=32) for _ in range(2)]
        for cache in caches:
            float_model(ids, cache=cache, use_cache=True)
        wanted = float_model(ids[:, :length], cache=caches[0], use_cache=True).logits
        found = compiled(ids[:, :length], cache=caches[1], use_cache=True).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mla_path", ["expanded", "absorbed"])
def test_requested_outputs(float_model, mla_path):
    float_model.set_attn_implementation("eager")
    ids, _ = prompt(1)
    with torch.no_grad():
        out = float_model(
            ids,
            mla_path=mla_path,
            output_attentions=True,
            output_hidden_states=True,
            output_router_logits=True,
        )
    float_model.set_attn_implementation("sdpa")
    config = float_model.config
    assert [a.shape for a in out.attentions] == [(1, config.num_attention_heads, 11, 11)] * 3
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(1, config.num_attention_heads, 11))
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert [r.shape for r in out.router_logits] == [(11, config.n_routed_experts)] * 2
