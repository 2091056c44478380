"""Caches that keep latents in FP8: what is attended to, what they hold, and the doors that they are asked for by."""

import copy

import pytest
import torch
from releases import SHAPES, write_release
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantizedCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cache import (
    Fp8LatentLayer,
    Fp8StaticLayer,
    LatentLayer,
    decode_latents,
    encode_latents,
    prepare_cache,
)
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.ops._latent_rows import row_bytes
from modeling_deepseek_moe.tiny.corpus import FAMILIES
from modeling_deepseek_moe.tiny.score import held_out

FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


class Rounded(LatentLayer):
    """The definition: latents in the activations' dtype, each rounded as FP8 would round it."""

    def update(self, key_states, value_states, *args, **kwargs):
        rounded = decode_latents(encode_latents(key_states), key_states.shape[-1], key_states.dtype)
        return super().update(rounded, value_states, *args, **kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3")
    write_release(folder, SHAPES["v3"]())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def caches(config) -> dict[str, Cache]:
    return {
        "defined": Cache(layers=[Rounded() for _ in range(config.num_hidden_layers)]),
        "growing": QuantizedCache("fp8", config),
        "static": dsm.Fp8StaticCache(config=config, max_cache_len=16),
    }


@torch.no_grad()
def decode(model, cache, **settings) -> torch.Tensor:
    """Logits of three tokens after a prompt, one and two at a time."""
    found = []
    for start, end in ((0, 8), (8, 9), (9, 11)):
        inputs = {"attention_mask": MASK[:, :end], "position_ids": POSITIONS[:, start:end], CACHE_NAME: cache}
        found.append(model(IDS[:, start:end], **inputs, **settings).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("rank", [512, 128, 192, 40])
def test_rows_are_codes_then_scales(rank):
    latents = torch.randn(2, 1, 5, rank, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
    latents[0, 0, 1] = 0
    latents[1, 0, 2, rank // 2] = torch.nan
    rows = encode_latents(latents)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 1, 5, row_bytes(rank))
    assert row_bytes(rank) == -(-rank // 16) * 16 + 16
    codes, scales = block_fp8.reference.quantize_tiles(latents.view(10, rank), power_of_two=False)
    assert torch.equal(rows.view(10, -1)[:, :rank], codes.view(torch.uint8))
    found = decode_latents(rows, rank, torch.bfloat16)
    wanted = block_fp8.reference.dequantize_tiles(codes, scales, torch.bfloat16).view_as(latents)
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert found[1, 0, 2].isnan().any() and not found[0, 0, 1].any()
    finite = ~found.isnan()
    assert ((found - latents)[finite].abs().max() / latents[finite].abs().max()) < 2**-4


@pytest.mark.parametrize("mla_path", ["absorbed", "expanded", None])
def test_attention_is_over_the_decoded_latents(model, mla_path):
    made = caches(model.config)
    wanted = decode(model, made["defined"], mla_path=mla_path)
    for name in ("growing", "static"):
        assert_close(decode(model, made[name], mla_path=mla_path), wanted, atol=1e-5, rtol=1e-5)
    assert {type(layer) for layer in made["growing"].layers} == {Fp8LatentLayer}
    assert {type(layer) for layer in made["static"].layers} == {Fp8StaticLayer}


def test_what_is_held(model):
    config = model.config
    assert row_bytes(512) + 64 * 2 == 656
    for cache in list(caches(config).values())[1:]:
        decode(model, cache)
        layer = cache.layers[0]
        assert layer.keys.dtype == torch.uint8 and layer.values.dtype == torch.float32
        assert layer.keys.nbytes == 2 * layer.keys.shape[2] * row_bytes(config.kv_lora_rank)


def test_the_doors_of_generate(model):
    inputs = {"attention_mask": MASK, **GREEDY}
    made = caches(model.config)
    wanted = model.generate(IDS, **inputs, **{CACHE_NAME: made["defined"]})
    assert torch.equal(model.generate(IDS, **inputs, **FP8), wanted)
    static = dsm.Fp8StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(IDS, **inputs, **{CACHE_NAME: static}), wanted)
    # what reorders, repeats and crops a cache moves scales with their codes
    beams = inputs | {"num_beams": 3, "num_return_sequences": 2}
    defined = Cache(layers=[Rounded() for _ in static.layers])
    wanted = model.generate(IDS, **beams, **{CACHE_NAME: defined})
    assert torch.equal(model.generate(IDS, **beams, **FP8), wanted)


def test_drafts_are_taken_back(model):
    ids = torch.cat((IDS, IDS), dim=1)  # something to look up
    for cache in ("growing", "static"):
        held = {CACHE_NAME: dsm.Fp8StaticCache(model.config, max_cache_len=64)} if cache == "static" else FP8
        settings = {"attention_mask": torch.ones_like(ids), **GREEDY, **held}
        again = (
            {**settings, CACHE_NAME: dsm.Fp8StaticCache(model.config, max_cache_len=64)}
            if cache == "static"
            else settings
        )
        wanted = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **again), wanted)
        assert model.draft_stats.drafted


def test_a_copy_and_a_crop(model):
    cache = caches(model.config)["growing"]
    with torch.no_grad():
        model(IDS, **{CACHE_NAME: cache})
        twin = copy.deepcopy(cache)
        twin.crop(-3)
        assert twin.get_seq_length() == 8 and cache.get_seq_length() == 11
        again = model(IDS[:, 8:], **{CACHE_NAME: twin}).logits
    assert again.shape[1] == 3
    for layer, other in zip(cache.layers[:1], twin.layers[:1], strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


@pytest.mark.slow
def test_a_compiled_step(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (model, compiled):
        cache = caches(model.config)["static"]
        with torch.no_grad():
            model(IDS, **{CACHE_NAME: cache})
            found.append(call(IDS[:, :1], **{CACHE_NAME: cache}).logits)
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_gradient_that_would_be_lost_raises(model):
    out = model(IDS, mla_path="absorbed", **{CACHE_NAME: QuantizedCache("fp8", model.config)})
    with pytest.raises(RuntimeError, match="FP8: latents are rounded and have no gradient"):
        out.logits.sum().backward()


def test_what_it_cannot_hold():
    config = SHAPES["v32"]() if "v32" in SHAPES else dsm.DeepseekV32Config(q_lora_rank=32)
    with pytest.raises(ValueError, match="indexers cache keys too"):
        dsm.Fp8StaticCache(config=config, max_cache_len=16)
    with pytest.raises(ValueError, match="only full attention"):
        QuantizedCache("fp8", config)


def test_layers_that_something_else_has_filled_stay(model):
    cache = QuantizedCache("fp8", model.config)
    cache.update(torch.randn(1, 1, 3, 32), torch.randn(1, 1, 3, 8), 0)
    prepare_cache(cache, model.config, 1)
    assert type(cache.layers[0]) is Fp8QuantizedLayer and type(cache.layers[1]) is Fp8LatentLayer


def test_the_tiny_checkpoint_says_what_it_says_in_bf16():
    """FP8 latents against bf16 ones: the same greedy text of every prompt, and logits near the others'."""
    path = dsm.tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    asked = [problem for family in FAMILIES for problem in held_out(family, 2)]
    texts = [tokenizer.apply_chat_template(problem.messages[:1], tokenize=False) for problem in asked]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    settings = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    wanted, found = model.generate(**inputs, **settings), model.generate(**inputs, **settings, **FP8)
    assert len(asked) == 12 and torch.equal(found.sequences, wanted.sequences)
    pairs = [torch.stack(out.logits).float().log_softmax(-1) for out in (found, wanted)]
    divergence = torch.nn.functional.kl_div(*pairs, log_target=True, reduction="none").sum(-1)
    # nothing was taught about what follows a text's end
    is_said = wanted.sequences[:, -len(wanted.logits) :].T.ne(tokenizer.pad_token_id)
    assert 0 < divergence[is_said].mean() < 0.01
