"""Doors of generation, each next to plain transformers on the same weights.

| door | plain | here |
|---|---|---|
| `generate_batch`, its manager | fails: pages are laid out for other keys | token for token `generate`, only latents in the pages |
| assisted decoding, prompt look-up | dynamic; static since 5.24 | the same |
| quantized caches | works | works |
"""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from releases import COMMON, V3, two_layer_releases
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, FineGrainedFP8Config, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation import ContinuousBatchingConfig

from modeling_deepseek_moe import DeepseekV3Config, tiny_checkpoint
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.ops.absorbed_attention import absorbed_attention
from modeling_deepseek_moe.quantized.mapped import MappedExperts

pytestmark = pytest.mark.tools

PLAIN = {"v3": transformers.DeepseekV3ForCausalLM, "v2": transformers.DeepseekV2ForCausalLM}
NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"page_size": 16, "num_blocks": 16, "max_batch_tokens": 64}
RANK = COMMON["kv_lora_rank"]
STATIC_CROPS = Version(transformers.__version__) >= Version("5.24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_layer_releases(tmp_path_factory)


def load(folder, dtype=torch.float32, cls=AutoModelForCausalLM, **settings):
    model = cls.from_pretrained(folder, dtype=dtype, **settings).eval()
    model.generation_config.update(do_sample=False, eos_token_id=-1, pad_token_id=0)
    return model


def prompts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


def alone(model, prompt: list[int]) -> list[int]:
    return model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()


def batched(model, requests, max_new_tokens=NEW, **settings) -> list[list[int]]:
    asked = ContinuousBatchingConfig(**(SMALL | settings))
    results = model.generate_batch(requests, continuous_batching_config=asked, max_new_tokens=max_new_tokens)
    assert [result.error for result in results.values()] == [None] * len(requests)
    return [result.generated_tokens for result in results.values()]


# Continuous batching


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_a_batch_equals_plain_generation_of_each_alone(folder, kind, implementation):
    requests = prompts(5, 17, 1, 40, 9)
    model = load(folder(kind), attn_implementation=implementation)
    plain = load(folder(kind), cls=PLAIN[kind])
    assert batched(model, requests) == [alone(plain, request) for request in requests]
    assert model.config._attn_implementation == implementation
    assert alone(model, requests[0]) == alone(plain, requests[0])


@pytest.mark.parametrize("kind", ["v3-mtp", "moonlight", "v2-lite"])
def test_other_shapes(folder, kind):
    requests = prompts(5, 17, 9)
    model = load(folder(kind))
    assert batched(model, requests) == [alone(model, request) for request in requests]


@pytest.mark.parametrize(("kind", "implementation"), [("v3", "sdpa"), ("v2", "eager")])
def test_fp8_resident(folder, kind, implementation):
    requests = prompts(5, 17, 9)
    model = load(folder(kind, fp8=True), attn_implementation=implementation)
    assert batched(model, requests) == [alone(model, request) for request in requests]


@pytest.mark.parametrize("fp8", [False, True])
def test_bf16(fp8):
    """Of a model that has learnt something: prompts in one batch round otherwise than alone, in the last bit."""
    settings = {} if fp8 else {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = load(tiny_checkpoint(), torch.bfloat16, **settings)
    assert fp8 == isinstance(model.model.layers[-1].mlp.experts, MappedExperts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint())
    requests = tokenizer(["12 + 34 =", "The", "a longer prompt of some more words, and", "7 * 8 ="]).input_ids
    assert batched(model, requests) == [alone(model, request) for request in requests]


def test_with_an_adapter(folder):
    adapted = get_peft_model(load(folder("v3")), LoraConfig(target_modules=["q_b_proj", "kv_b_proj"], r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model, plain = adapted.eval(), load(folder("v3"))
    requests = prompts(5, 17)
    found = batched(model, requests)
    assert found == [model.generate(input_ids=torch.tensor([r]), **GREEDY)[0, len(r) :].tolist() for r in requests]
    assert found != [alone(plain, request) for request in requests]


@pytest.mark.parametrize("rank", [32, 33])
def test_pages_hold_the_latents_and_nothing_else(rank):
    config = DeepseekV3Config(**(COMMON | {"kv_lora_rank": rank}), **V3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(**SMALL))
    manager.warmup()
    (allocator,) = manager.batch_processor.cache.cache_allocators.values()
    width = rank + config.qk_rope_head_dim
    assert allocator.bytes_per_block == 16 * config.num_hidden_layers * (width + width % 2) * 2
    model.to(torch.float32)
    requests = prompts(5, 20)
    assert batched(model, requests) == [alone(model, request) for request in requests]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 4},  # three of eight requests at a time
        {"max_batch_tokens": 8},  # prompts in pieces, next to the others' new tokens
        {"page_size": 4, "num_blocks": 30},
        {"allow_block_sharing": False},
    ],
    ids=str,
)
def test_more_than_fits_at_once(folder, settings):
    model = load(folder("v3"))
    requests = prompts(5, 30, 3, 9, 21, 14, 2, 26)
    requests += [requests[1][:20] + requests[4], requests[1]]  # of which pages are shared
    assert batched(model, requests, **settings) == [alone(model, request) for request in requests]


@pytest.mark.parametrize("kind", ["v3", "v2-lite"])
def test_all_requests_at_once_as_on_a_card(folder, kind, monkeypatch):
    """Steps of one token each find every latent by the manager's index, and make no list of the requests."""
    calls = []

    def attend(q_nope, q_pe, pages, kv_b_proj, scaling):
        calls.append(len(q_nope))
        ranges = zip(pages.starts.tolist(), pages.starts.tolist()[1:], strict=False)
        outputs = []
        for request, (start, stop) in enumerate(ranges):
            assert 0 < stop - start <= pages.longest
            own = pages.rows[start:stop]
            latents = torch.cat((pages.first[own], pages.second[own]), dim=-1)
            c_kv, k_pe, _ = latents[None, None].tensor_split((RANK, RANK + q_pe.shape[3]), dim=-1)
            query = q_nope[request, None], q_pe[request, None]
            outputs.append(absorbed_attention(*query, c_kv, k_pe, None, kv_b_proj, scaling)[0])
        return torch.cat(outputs)

    requests = prompts(5, 17, 1, 40, 9)
    model = load(folder(kind))
    wanted = batched(model, requests)
    monkeypatch.setattr("modeling_deepseek_moe.attention.weight_for_pages", lambda *arguments: arguments[-1])
    monkeypatch.setattr("modeling_deepseek_moe.attention.attend_pages", attend)
    assert batched(model, requests) == wanted
    assert calls.count(len(requests)) >= (NEW - 2) * model.config.num_hidden_layers


def test_several_answers_a_prompt(folder):
    model = load(folder("v3"))
    (request,) = prompts(18)
    model.generation_config.num_return_sequences = 3
    asked = ContinuousBatchingConfig(**SMALL)
    results = model.generate_batch([request], continuous_batching_config=asked, max_new_tokens=NEW)
    model.generation_config.num_return_sequences = 1
    assert [result.generated_tokens for result in results.values()] == [alone(model, request)] * 3


def test_streaming_by_the_manager(folder):
    model = load(folder("v3"))
    first, second = prompts(7, 19)
    asked = ContinuousBatchingConfig(**SMALL)
    with model.continuous_batching_context_manager(continuous_batching_config=asked) as manager:
        manager.add_request(second, request_id="waits", max_new_tokens=NEW)
        manager.add_request(first, request_id="streams", max_new_tokens=NEW, streaming=True)
        seen, done = [], {}
        while len(done) < 2:
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None
            if result.request_id == "streams":
                seen.append(list(result.generated_tokens))
            if result.is_finished():
                done[result.request_id] = result.generated_tokens
    wanted = alone(model, first)
    assert done == {"streams": wanted, "waits": alone(model, second)}
    assert seen == [wanted[:length] for length in range(1, NEW + 1)]


def test_a_manager_that_is_kept(folder):
    model = load(folder("v3"))
    requests = prompts(7, 19)
    asked = ContinuousBatchingConfig(**SMALL)
    for _ in range(2):
        results = model.generate_batch(
            requests, continuous_batching_config=asked, max_new_tokens=NEW, persistent_manager=True
        )
        assert [result.generated_tokens for result in results.values()] == [alone(model, r) for r in requests]
        manager = model.init_continuous_batching()
        assert manager is model._cached_continuous_batching_manager
    model.destroy_cached_continuous_batching_manager()
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_no_more_pages_than_the_requests_need(folder):
    """Where no one says how many: on a CPU transformers would take three fifths of the machine's memory."""
    model = load(folder("v3"))
    requests = prompts(300, 19)
    results = model.generate_batch(requests, max_new_tokens=NEW, persistent_manager=True)
    cache = model._cached_continuous_batching_manager.batch_processor.cache
    model.destroy_cached_continuous_batching_manager()
    assert [result.generated_tokens for result in results.values()] == [alone(model, r) for r in requests]
    assert cache.num_blocks == 6  # of 256 tokens, two a request and a quarter more
    manager = model.init_continuous_batching()
    assert 0 < manager.continuous_batching_config.max_memory_percent < 0.6


@pytest.mark.parametrize(
    "setting",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"default_compile_level": 1},
        {"max_blocks_per_request": 4},
    ],
    ids=str,
)
def test_graphs_of_fixed_shapes_are_refused(folder, setting):
    model = load(folder("v3"))
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}=.* is not supported, leave it out"):
        batched(model, prompts(3), **setting)


# Assisted decoding and caches


@pytest.fixture(scope="module")
def assistant(folder):
    """Agrees with the model it helps now and then."""
    model = load(folder("v3"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model


@pytest.mark.parametrize("how", ["assistant", "lookup"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_assisted_decoding(folder, assistant, kind, cache, how):
    model, plain = load(folder(kind)), load(folder(kind), cls=PLAIN[kind])
    ids = torch.tensor([prompts(11)[0] * 2])  # something for the look-up to find
    help_ = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    # with room for candidates beyond the last token
    held = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=64)} if cache == "static" else {}
    if held and not STATIC_CROPS:
        with pytest.raises(ValueError, match="assisted generate is not supported with Static cache"):
            model.generate(ids, **GREEDY, **help_, **held)
        return
    assert torch.equal(model.generate(ids, **GREEDY, **help_, **held), plain.generate(ids, **GREEDY))


@pytest.mark.parametrize("cache", ["dynamic", *(["static"] if STATIC_CROPS else [])])
def test_cropping_takes_tokens_back(folder, cache):
    model, plain = load(folder("v3")), load(folder("v3"), cls=PLAIN["v3"])
    (ids,) = torch.tensor([prompts(12)])
    held = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=16)
    other = ids[:, :4].flip(1)
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE_NAME: held})
        before = held.layers[0].keys[:, :, :12].clone()
        assert getattr(held, "is_croppable", True)
        held.crop(-4)
        assert int(held.get_seq_length()) == 8
        found = model(other, use_cache=True, **{CACHE_NAME: held}).logits
        wanted = plain(torch.cat((ids[:, :8], other), dim=1)).logits[:, 8:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(held.layers[0].keys[:, :, :8], before[:, :, :8])
    assert int(held.get_seq_length()) == 12


class _Exact(QuantizedLayer):
    """A quantized layer that loses nothing: what is left of it is transformers' bookkeeping."""

    def _quantize(self, tensor, axis):
        return tensor.double()

    def _dequantize(self, tensor):
        return tensor.to(self.keys.dtype)


def test_quantized_layers(folder):
    model, plain = load(folder("v3")), load(folder("v3"), cls=PLAIN["v3"])
    ids = torch.tensor(prompts(11))
    layers = [_Exact(residual_length=5) for _ in range(model.config.num_hidden_layers)]
    found = model.generate(ids, **GREEDY, **{CACHE_NAME: Cache(layers=layers)})
    assert torch.equal(found, plain.generate(ids, **GREEDY))


def test_a_cache_laid_out_for_other_keys_is_refused(folder):
    model = load(folder("v3"))
    held = StaticCache(model.config, max_cache_len=16)
    held.early_initialization(1, model.config.num_attention_heads, model.config.head_dim, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"found 4 heads with keys of 8 .* wanted 1 head of 32 and 8"):
        model.generate(torch.tensor(prompts(4)), **GREEDY, **{CACHE_NAME: held})


@pytest.mark.parametrize("length", [12, 20])
def test_a_static_cache_without_room_says_so(folder, length):
    """A prompt that does not fit, and an answer that does not: torch's own error named an index."""
    model = load(folder("v3"))
    held = StaticCache(model.config, max_cache_len=14)
    with pytest.raises(
        ValueError, match=f"found room for 14 tokens, wanted {max(15, length)}: give it a larger max_c"
    ):
        model.generate(torch.tensor([prompts(length)[0]]), **GREEDY, **{CACHE_NAME: held})
