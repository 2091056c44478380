"""A token from its id to its logits in one call of the CPU engine: the bits of the model's own forward, and what is asked of that."""

import inspect

import pytest
import torch
from engine_cases import needs_engine
from next_token_cases import KINDS, decoding, ids, load, note_steps, steps
from releases import SHAPES, write_release
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.engine import next_token
from modeling_deepseek_moe.engine.next_token import ROWS
from modeling_deepseek_moe.modeling import DeepseekMoeForCausalLM
from modeling_deepseek_moe.rope import DeepseekRotaryEmbedding

pytestmark = needs_engine


@pytest.fixture(scope="module", params=KINDS, ids=str)
def folder(request, tmp_path_factory):
    kind, fp8 = request.param
    path = tmp_path_factory.mktemp(kind)
    write_release(path, SHAPES[kind](), fp8=fp8)
    return path


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture
def taken(monkeypatch):
    return note_steps(monkeypatch)


# ---- the same bits ----


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_has_the_bits_of_the_models_own_forward(model, rows, taken, by_layers):
    found = steps(model, rows)
    assert taken == [10, 11, 12, 13]  # the first step makes the plan
    assert torch.equal(found, by_layers(steps, model, rows))


def test_goes_on_past_the_rows_of_its_tables_and_back(model, taken, by_layers):
    @torch.no_grad()
    def walk() -> torch.Tensor:
        cache, other, found = DynamicCache(config=model.config), DynamicCache(config=model.config), []
        model(ids(1, 9), cache=cache)
        model(ids(1, 40), cache=other)
        for step in range(2 * ROWS + 3):
            if step == ROWS + 5:
                cache.crop(-ROWS)
            found += [model(torch.tensor([[3 + step % 90]]), cache=kept).logits for kept in (cache, other)]
        return torch.cat(found)

    found = walk()
    assert len(taken) == 2 * (2 * ROWS + 3) - 1
    assert torch.equal(found, by_layers(walk))


def test_under_inference_mode_and_out_of_it(model, taken, by_layers):
    def walk() -> torch.Tensor:
        cache, found = DynamicCache(config=model.config), []
        with torch.inference_mode():
            model(ids(1, 9), cache=cache)
        for step in range(6):
            with torch.inference_mode() if step % 2 else torch.no_grad():
                found.append(model(torch.tensor([[3 + step]]), cache=cache).logits.clone())
        return torch.cat(found)

    found = walk()
    assert len(taken) == 5 and torch.equal(found, by_layers(walk))


def test_generate_takes_it(model, taken, by_layers):
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = ids(2, 9)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert len(taken) == 10
    assert torch.equal(found, by_layers(model.generate, prompt, attention_mask=torch.ones_like(prompt), **asked))


def test_returns_what_is_asked_for(model, taken):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 9), cache=cache)
        outputs = [model(torch.tensor([[5]]), cache=cache) for _ in range(2)]
        pair = model(torch.tensor([[5]]), cache=cache, return_dict=False)
    assert taken == [10, 11]
    first, second = outputs
    assert second[CACHE_NAME] is cache and second.keys() == first.keys()
    assert isinstance(pair, tuple) and pair[0].shape == (1, 1, model.config.vocab_size) and pair[1] is cache


@pytest.mark.parametrize("rope", ["default", "yarn", "linear"])
def test_rows_of_tables_have_the_bits_of_single_ones(rope):
    config = SHAPES["v3"]()
    config.max_position_embeddings = 163840
    config.rope_parameters = {"rope_type": rope, "rope_theta": 10000.0} | (
        {} if rope == "default" else {"factor": 40.0, "original_max_position_embeddings": 4096}
    )
    config.qk_rope_head_dim = config.head_dim = 64
    rotary, like = DeepseekRotaryEmbedding(config), torch.empty(1)
    for begin in (1, 9, 4095, 70001, 163840 - ROWS):
        many = rotary(like, torch.arange(begin, begin + ROWS)[None])
        for row in range(ROWS):
            single = rotary(like, torch.tensor([[begin + row]]))
            assert all(torch.equal(table[:, row : row + 1], own) for table, own in zip(many, single, strict=True))


# ---- what the engine's call is not for ----


def test_other_arguments_are_none_that_it_does_not_know():
    """A new argument of the forward is passed on, where anything but None or False calls the model's own."""
    known = {"input_ids", "attention_mask", "position_ids", "cache", CACHE_NAME, "logits_to_keep", "use_cache", "self"}
    known |= {"row_weights"}  # of labels
    passed = {"labels", "inputs_embeds", "mla_path", "kwargs"}
    assert set(inspect.signature(DeepseekMoeForCausalLM.forward).parameters) <= known | passed


ASKED = {
    "hidden states": {"output_hidden_states": lambda *_: True},
    "router logits": {"output_router_logits": lambda *_: True},
    "the form of attention": {"mla_path": lambda *_: "expanded"},
    "a choice of logits": {"logits_to_keep": lambda *_: torch.tensor([0])},
    "labels": {"labels": lambda rows, _: torch.full((rows, 1), 3)},
    "padding": {"attention_mask": lambda rows, past: (torch.arange(past + 1) > 2).long().expand(rows, -1)},
    "a mask of four dimensions": {"attention_mask": lambda rows, past: torch.ones(rows, 1, 1, past + 1).bool()},
    "positions of packed rows": {"position_ids": lambda rows, past: torch.full((rows, 1), past - 4)},
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for_besides_goes_through_the_model(model, name, taken, by_layers):
    found = steps(model, **ASKED[name])
    assert not taken
    assert torch.equal(found, by_layers(steps, model, **ASKED[name]))


@pytest.mark.parametrize("name", ["hidden states", "router logits"])
def test_outputs_that_were_asked_for_once_do_not_slow_later_tokens(model, name, taken, by_layers):
    """transformers leaves its hooks on the layers, which have nothing to collect afterwards."""
    field, asked = name.replace(" ", "_"), {f"output_{name.replace(' ', '_')}": True}

    @torch.no_grad()
    def walk() -> list[torch.Tensor]:
        cache, found = decoding(model), []
        for named in (asked, {}, {}, asked, {}, {}):
            result = model(ids(1, 1), cache=cache, **named)
            found += [result.logits, *(getattr(result, field) if named else ())]
        return found

    found = walk()
    assert taken == [10, 13, 16]  # a plan that was made again takes the token after
    assert len(found) > 6 and all(map(torch.equal, found, by_layers(walk)))


TAKEN_TOO = {
    "a mask of ones": {"attention_mask": lambda rows, past: torch.ones(rows, past + 1).long()},
    "positions": {"position_ids": lambda rows, past: torch.full((rows, 1), past)},
    "one row of positions": {"position_ids": lambda rows, past: torch.tensor([[past]])},
    "a cache": {"use_cache": lambda *_: True},
    "one logit": {"logits_to_keep": lambda *_: 1},
}


@pytest.mark.parametrize("name", TAKEN_TOO)
def test_what_says_nothing_new_is_taken(model, name, taken, by_layers):
    found = steps(model, **TAKEN_TOO[name])
    assert len(taken) == 4
    assert torch.equal(found, by_layers(steps, model, **TAKEN_TOO[name]))


def test_more_than_a_token_or_a_few_rows_goes_through_the_model(model, taken):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 9), cache=cache)
        model(ids(1, 1), cache=cache)
        model(ids(1, 2), cache=cache)
        many = DynamicCache(config=model.config)
        model(ids(9, 9), cache=many)
        model(ids(9, 1), cache=many)
        model(ids(9, 1), cache=many)
        static = StaticCache(model.config, max_cache_len=16)
        for length in (4, 1, 1):
            model(ids(1, length), cache=static)
    assert not taken


def test_gradients_and_autocast_go_through_the_model(model, taken):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 9), cache=cache)
        model(ids(1, 1), cache=cache)
    assert model(ids(1, 1), cache=cache).logits.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids(1, 1), cache=cache)
    assert not taken


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        return 2 * found if "embedding" in str(function) or "bf16_linear" in str(function) else found


def test_modes_and_profilers_see_operators(model, taken, monkeypatch):
    """As they do where the model's own forward takes each step."""
    cache, other = decoding(model), decoding(model)
    taken.clear()
    with torch.no_grad():
        with Doubling(), monkeypatch.context() as patch:
            found = model(ids(1, 1), cache=cache).logits
            patch.setattr(next_token, "logits", lambda *_: None)
            assert torch.equal(found, model(ids(1, 1), cache=other).logits)
        with torch.profiler.profile() as profile:
            model(ids(1, 1), cache=cache)
    assert not taken and any("embedding" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("wrong", [-1, 1 << 40, "vocabulary"])
def test_an_id_that_is_none(model, taken, wrong):
    cache = DynamicCache(config=model.config)
    wrong = model.config.vocab_size if wrong == "vocabulary" else wrong
    with torch.no_grad():
        model(ids(1, 9), cache=cache)
        model(ids(1, 1), cache=cache)
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor([[wrong]]), cache=cache)
        assert taken == [10] and cache.get_seq_length() == 10
        model(ids(1, 1), cache=cache)
    assert cache.get_seq_length() == 11
