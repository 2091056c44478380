"""A token in one call of the CPU engine: what is changed in the model or attached to it between two tokens counts from the next."""

import gc
import weakref

import pytest
import torch
from engine_cases import needs_engine
from next_token_cases import KINDS, decoding, ids, load, note_steps, steps
from releases import COMMON, SHAPES, V3, write_release
from torch import nn
from transformers import DynamicCache

from modeling_deepseek_moe import DeepseekV3Config
from modeling_deepseek_moe.engine.next_token import ROWS
from modeling_deepseek_moe.modeling import DeepseekMoeModel

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
    "the embedding": lambda model: model.set_input_embeddings(
        nn.Embedding.from_pretrained(model.model.embed_tokens.weight.data.flip(0))
    ),
    "the embedding's memory": halved,
    "the embedding in place": lambda model: model.model.embed_tokens.weight.data.mul_(-1),
    "the embedding's norm": lambda model: setattr(model.model.embed_tokens, "max_norm", 0.01),
    "the embedding's class": lambda model: setattr(model.model.embed_tokens, "__class__", HalvedRows),
    "the head's class": lambda model: setattr(model.lm_head, "__class__", NegatedRows),
    "a bias of the head": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(128).bfloat16())),
    "frequencies as data": lambda model: model.model.rotary_emb.inv_freq.data.mul_(3),
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


class HalvedRows(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) / 2


class NegatedRows(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


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
def test_a_change_counts_from_the_next_token(folder, name, by_layers):
    found = steps(load(folder), between=CHANGES[name])
    wanted = by_layers(steps, load(folder), between=CHANGES[name])
    unchanged = steps(load(folder))
    assert torch.equal(found, wanted)
    assert torch.equal(found[:4], unchanged[:4]) and not torch.equal(found[4:], unchanged[4:])


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_the_same_memory_turned(tmp_path, name, by_layers):
    write_release(tmp_path, DeepseekV3Config(**(COMMON | V3 | {"vocab_size": 64})))

    def turn(model):
        weight = model.get_input_embeddings().weight if name == "embed_tokens" else model.lm_head.weight
        weight.data = weight.data.t()

    @torch.no_grad()
    def walk(model) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        found = [model(ids(1, length) % 64, cache=cache).logits[:, -1] for length in (9, 1, 1)]
        turn(model)
        return torch.cat([*found, model(torch.tensor([[5]]), cache=cache).logits[:, -1]])

    assert torch.equal(walk(load(tmp_path)), by_layers(walk, load(tmp_path)))


def test_positions_of_no_token(model):
    cache = decoding(model, rows=2)
    with torch.no_grad(), pytest.raises(ValueError, match="position_ids: found 0 of each sequence, wanted 1"):
        model(ids(2, 1), cache=cache, position_ids=torch.zeros((2, 0)).long())


def test_fewer_rows_at_the_same_place(model):
    cache = decoding(model)
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.data[:100]
        assert model(ids(1, 1), cache=cache).logits.shape == (1, 1, 100)
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[:8]
        with pytest.raises(IndexError):
            model(torch.tensor([[10]]), cache=cache)


WIDTHS = {
    "the embedding": lambda model, width: model.set_input_embeddings(nn.Embedding(128, width, dtype=torch.bfloat16)),
    "its weight": lambda model, width: setattr(
        model.model.embed_tokens, "weight", nn.Parameter(torch.ones(128, width).bfloat16())
    ),
    "the head": lambda model, width: setattr(
        model, "lm_head", nn.Linear(width, 128, bias=False, dtype=torch.bfloat16)
    ),
}


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("name", WIDTHS)
def test_other_widths_are_an_error(model, name, width):
    cache = decoding(model, rows=2)
    with torch.no_grad():
        WIDTHS[name](model, width)
        with pytest.raises((ValueError, RuntimeError)):
            model(ids(2, 1), cache=cache)


CHANGES_OF_SCALES = {
    "absmax": lambda state, inner: setattr(inner, "absmax", inner.absmax / 2),
    "its data": lambda state, inner: setattr(inner.absmax, "data", inner.absmax.data / 2),
    "offset": lambda state, inner: setattr(state, "offset", state.offset * 2 + 1),
    "code": lambda state, inner: setattr(inner, "code", inner.code / 2),
}
NESTED = [("nf4-double", part) for part in CHANGES_OF_SCALES]


@pytest.mark.tools
@pytest.mark.parametrize(("kind", "part"), [("nf4", "absmax"), ("nf4", "its data"), *NESTED])
def test_scales_of_a_head_in_four_bits_may_be_others(tmp_path, kind, part, by_layers):
    bnb_models = pytest.importorskip("bnb_models")
    config = DeepseekV3Config(**(COMMON | V3 | bnb_models.SIZES | {"moe_intermediate_size": 192}))
    write_release(tmp_path, config)

    def change(model):
        state = model.lm_head.weight.quant_state
        inner = state.state2 if state.nested else state
        CHANGES_OF_SCALES[part](state, inner)

    def run() -> torch.Tensor:
        wish = bnb_models.wish(kind, torch.bfloat16, llm_int8_skip_modules=[])
        return steps(bnb_models.load(tmp_path, wish, dtype=torch.bfloat16), rows=1, between=change)

    assert torch.equal(run(), by_layers(run))


def test_another_default_device(model, taken):
    """Which tensors are not made on that the engine reads and writes."""
    cache = decoding(model)
    with torch.no_grad():
        with torch.device("meta"):
            found = model(torch.tensor([[5]], device="cpu"), cache=cache).logits
            for _ in range(2 * ROWS + 300):  # the cache grows meanwhile
                model(torch.tensor([[5]], device="cpu"), cache=cache)
    assert found.device.type == "cpu" and len(taken) == 2 * ROWS + 302


def test_a_model_that_is_deleted_is_gone(folder, taken):
    """At once, and not when the collector comes by: it may have hundreds of GB."""
    model = load(folder)
    cache = decoding(model)
    seen = [weakref.ref(module) for module in (model.lm_head, model.model.layers[1], model.model.embed_tokens)]
    gc.disable()
    try:
        del model
        assert taken and cache.get_seq_length() and not any(reference() for reference in seen)
    finally:
        gc.enable()


def test_a_forward_that_is_put_in_the_decoders_place(model, taken, monkeypatch):
    called, forward = [], DeepseekMoeModel.forward
    monkeypatch.setattr(
        DeepseekMoeModel, "forward", lambda self, *given, **named: called.append(1) or forward(self, *given, **named)
    )
    steps(model)
    assert len(called) == 6 and not taken


class Called(DeepseekMoeModel):
    def __call__(self, *arguments, **named):
        self.calls.append(1)
        return super().__call__(*arguments, **named)


def test_a_call_of_a_subclass(model, taken):
    model.model.__dict__["calls"] = []
    model.model.__class__ = Called
    steps(model)
    assert len(model.model.calls) == 6 and not taken


def test_a_config_whose_class_is_not_causal(model, taken, by_layers):
    model.config.__class__ = type("Config", (type(model.config),), {"is_causal": False})
    assert torch.equal(steps(model), by_layers(steps, model)) and not taken
