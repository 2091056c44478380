"""A token from its id to its logits in one call of the CPU engine: the bits of the model's own forward, and when that is called instead."""

import inspect

import pytest
import torch
from engine_cases import by_layers_alone, needs_engine
from releases import SHAPES, write_release
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.engine.next_token import ROWS, NextToken
from modeling_deepseek_moe.modeling import DeepseekMoeForCausalLM, DeepseekMoeModel
from modeling_deepseek_moe.rope import DeepseekRotaryEmbedding

pytestmark = needs_engine
KINDS = [("v3", False), ("v3", True), ("v2", False)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def folder(request, tmp_path_factory):
    kind, fp8 = request.param
    path = tmp_path_factory.mktemp(kind)
    write_release(path, SHAPES[kind](), fp8=fp8)
    return path


@pytest.fixture
def model(folder):
    return load(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture
def taken(monkeypatch):
    """The positions of the steps that were taken in one call."""
    positions, run = [], NextToken.run

    def noted(self, input_ids, cache, past_length):
        positions.append(past_length)
        return run(self, input_ids, cache, past_length)

    monkeypatch.setattr(NextToken, "run", noted)
    return positions


@pytest.fixture
def by_layers(monkeypatch):
    def compute(function, *arguments, **named):
        with monkeypatch.context() as patch:
            by_layers_alone(patch)
            return function(*arguments, **named)

    return compute


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def steps(model, rows=2, count=5, between=None, **asked) -> torch.Tensor:
    """Logits of a prompt of 9 tokens, and of ``count`` more; ``between`` is called with the model before the fourth."""
    cache = DynamicCache(config=model.config)
    found = [model(ids(rows, 9), cache=cache).logits[:, -1]]
    for step in range(count):
        if between is not None and step == 3:
            between(model)
        new = {name: make(rows, 9 + step) for name, make in asked.items()}
        found.append(model(torch.full((rows, 1), 5 + step), cache=cache, **new).logits[:, -1])
    assert cache.get_seq_length() == 9 + count
    return torch.stack(found)


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
    passed = {"labels", "inputs_embeds", "mla_path", "row_weights", "kwargs"}
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


def with_router_logits_in_the_config(model):
    model.config.output_router_logits = True


def with_a_state_of_training(model):
    from modeling_deepseek_moe.moe.training_state import TrainingState

    model.model.training_state = TrainingState()
    model.train()


def with_the_decoders_forward_replaced(model):
    model.model.forward = model.model.forward


BETWEEN = {  # changes nothing of the logits
    "router logits": with_router_logits_in_the_config,
    "training": with_a_state_of_training,
    "a forward": with_the_decoders_forward_replaced,
    "a hook on the decoder": lambda model: model.model.register_forward_hook(lambda *_: None),
    "a hook on the embedding": lambda model: model.model.embed_tokens.register_forward_pre_hook(lambda *_: None),
    "a hook on the tables": lambda model: model.model.rotary_emb.register_forward_hook(lambda *_: None),
    "a hook on the head": lambda model: model.lm_head.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_attached_goes_through_the_model(model, name, taken):
    wanted = steps(load(model.config._name_or_path))
    taken.clear()
    found = steps(model, between=BETWEEN[name])
    assert taken == [10, 11] and torch.equal(found, wanted)


def test_every_hook_is_called(model):
    """Forward hooks on what the engine would not call see each token."""
    seen = []
    for module in (model.model, model.model.embed_tokens, model.model.rotary_emb, model.lm_head):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    steps(model)
    assert len(seen) == 4 * 6


def halved(model):
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data / 2


CHANGES = {  # each changes logits
    "the embedding": lambda model: model.set_input_embeddings(nn.Embedding.from_pretrained(model.lm_head_rows())),
    "the embedding's memory": halved,
    "the embedding in place": lambda model: model.model.embed_tokens.weight.data.mul_(-1),
    "the head": lambda model: setattr(model, "lm_head", Negated(model.lm_head)),
    "the head's weight": lambda model: setattr(model.lm_head, "weight", nn.Parameter(-model.lm_head.weight)),
    "a hook on the head": lambda model: model.lm_head.register_forward_hook(lambda module, given, out: -out),
    "frequencies": lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 3),
    "frequencies in place": lambda model: model.model.rotary_emb.inv_freq.mul_(3),
    "the tables' factor": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 3.0),
    "a layer": lambda model: model.model.layers.__delitem__(slice(1, 2)),
    "the layers' order": lambda model: setattr(model.model, "layers", nn.ModuleList([*model.model.layers][::-1])),
    "the number of layers": lambda model: setattr(model.config, "num_hidden_layers", 2),
    "the decoder": lambda model: setattr(model, "model", Shifted(model.config, model.model)),
}


class Negated(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return -self.head(x)


class Shifted(DeepseekMoeModel):
    """A class of its own, whose forward does more."""

    def __init__(self, config, model):
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)

    def forward(self, *arguments, **named):
        out = DeepseekMoeModel.forward(self, *arguments, **named)
        out.last_hidden_state = out.last_hidden_state + 1
        return out


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_counts_from_the_next_token(folder, name, by_layers, monkeypatch):
    monkeypatch.setattr(
        DeepseekMoeForCausalLM, "lm_head_rows", lambda self: self.model.embed_tokens.weight.data.flip(0), raising=False
    )
    found = steps(load(folder), between=CHANGES[name])
    wanted = by_layers(steps, load(folder), between=CHANGES[name])
    unchanged = steps(load(folder))
    assert torch.equal(found, wanted)
    assert torch.equal(found[:4], unchanged[:4]) and not torch.equal(found[4:], unchanged[4:])


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
