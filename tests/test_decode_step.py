"""A decoder in one call of the CPU engine: the bits of its layers, when it is taken, and the cache that grows in place."""

import copy
import pickle
import threading

import pytest
import torch
from engine_cases import every_isa, needs_engine
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.cache import LatentLayer, prepare_cache
from modeling_deepseek_moe.engine.plan import SLOT, Plan
from modeling_deepseek_moe.ops import _native

GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=[(kind, fp8) for kind in SHAPES for fp8 in (False, True)], ids=str)
def model(request, tmp_path_factory):
    return load(tmp_path_factory, *request.param)


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    return load(tmp_path_factory, "v3", True)


def load(tmp_path_factory, kind, fp8, dtype=torch.bfloat16):
    folder = tmp_path_factory.mktemp(kind)
    write_release(folder, SHAPES[kind](), fp8=fp8)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def prompt(rows=2, length=11):
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, : 4 if rows > 1 else 0] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def logits(model, rows=2, steps=12, cache=None) -> torch.Tensor:
    """Of a prompt, then of one token after the other."""
    ids, mask = prompt(rows)
    cache = DynamicCache(config=model.config) if cache is None else cache
    found = [model(ids, attention_mask=mask, cache=cache).logits[:, -1]]
    for step in range(steps):
        mask = torch.cat((mask, mask.new_ones(rows, 1)), dim=1)
        token = torch.full((rows, 1), 5 + step)
        found.append(model(token, attention_mask=mask, cache=cache).logits[:, -1])
    return torch.stack(found)


@pytest.fixture
def fused_steps(monkeypatch):
    """The number of steps that were taken in one call, as a list of their tokens."""
    taken, step = [], Plan.step

    def noted(self, shape, *arguments):
        if all(runs for _, _, runs in self._segments):
            taken.append(shape[0])
        return step(self, shape, *arguments)

    monkeypatch.setattr(Plan, "step", noted)
    return taken


@needs_engine
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_has_the_bits_of_the_layers(model, rows, fused_steps, by_layers):
    found = logits(model, rows)
    assert fused_steps == [rows] * 12
    assert torch.equal(found, by_layers(logits, model, rows)) and len(fused_steps) == 12


@torch.no_grad()
def turns(model, rows=1) -> list[torch.Tensor]:
    """Logits of a prompt, then of several tokens at a time, some of which are taken back."""
    ids, mask = prompt(rows)
    cache = DynamicCache(config=model.config)
    found = [model(ids, attention_mask=mask, cache=cache).logits]
    for step, count in enumerate((2, 4, 1, 3)):
        mask = torch.cat((mask, mask.new_ones(rows, count)), dim=1)
        tokens = torch.arange(count).expand(rows, -1) + 5 + step
        found.append(model(tokens, attention_mask=mask, cache=cache).logits)
        if count > 1:
            cache.crop(-(count // 2))
        mask = mask[:, : cache.get_seq_length()]
    return found


@needs_engine
@pytest.mark.parametrize("rows", [1, 2])
def test_several_tokens_of_a_sequence_in_one_call(model, rows, fused_steps, by_layers):
    found = turns(model, rows)
    assert fused_steps == [rows] * 4
    wanted = by_layers(turns, model, rows)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)) and len(fused_steps) == 4


@every_isa
def test_several_tokens_in_one_call_are_what_torch_computes(isa, tmp_path_factory):
    model = load(tmp_path_factory, "v3", True, torch.float32)
    with use_backend("reference"):
        wanted = turns(model)
    with use_backend(isa):
        found = turns(model)
    assert model.model.__dict__[SLOT].stages[0].attention is None  # what is not of bf16 there runs by its modules
    assert all((one - other).norm() < 1e-4 * other.norm() for one, other in zip(found, wanted, strict=True))


@every_isa
def test_on_every_instruction_set(isa, one_model, fused_steps, by_layers):
    with use_backend(isa):
        found = logits(one_model)
        assert len(fused_steps) == 12 and torch.equal(found, by_layers(logits, one_model))


@needs_engine
def test_threads_do_not_change_the_bits(one_model):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(logits(one_model))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_engine
def test_models_at_once_in_several_threads(one_model):
    wanted, found = logits(one_model), {}
    workers = [
        threading.Thread(target=lambda index=index: found.update({index: logits(one_model)})) for index in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all(torch.equal(other, wanted) for other in found.values())


@needs_engine
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 4}], ids=str)
def test_generation(one_model, settings, fused_steps, by_layers):
    ids, mask = prompt()

    def generate():
        torch.manual_seed(0)
        return one_model.generate(ids, attention_mask=mask, **GREEDY | settings)

    found = generate()
    assert len(fused_steps) == 19
    assert torch.equal(found, by_layers(generate))


@needs_engine
def test_a_hook_is_called_and_a_new_weight_is_read(one_model, fused_steps, by_layers):
    model, before = one_model, logits(one_model)
    fused_steps.clear()
    layer, seen = model.model.layers[1], []
    for module in (layer, layer.mlp.experts, layer.self_attn.kv_a_layernorm):
        hook = module.register_forward_hook(lambda *_: seen.append(1))
        logits(model, steps=3)
        assert len(seen) == 4 and not fused_steps
        hook.remove()
        seen.clear()
    out = model(*prompt()[:1], output_hidden_states=True)
    assert len(out.hidden_states) == 4
    cache = DynamicCache(config=model.config)
    weight = layer.input_layernorm.weight
    with torch.no_grad():
        ids = prompt(1)[0]
        model(ids, cache=cache)
        old = model(ids[:, :1], cache=copy.deepcopy(cache)).logits
        layer.input_layernorm.weight = torch.nn.Parameter(weight * 2)
        new = model(ids[:, :1], cache=copy.deepcopy(cache)).logits
        assert not torch.equal(old, new)
        assert torch.equal(new, by_layers(lambda: model(ids[:, :1], cache=copy.deepcopy(cache)).logits))
        layer.input_layernorm.weight = weight
    assert torch.equal(logits(model), before)


@needs_engine
def test_falls_back_to_layers(tmp_path_factory, fused_steps):
    model = load(tmp_path_factory, "v3", True)
    with use_backend("reference"):
        logits(model, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, steps=2)
    logits(model, rows=9, steps=2)
    ids, _ = prompt(1)
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)  # gradients are on, and norms may want theirs
    model(ids[:, :1], cache=cache).logits.float().sum().backward()
    assert model.model.norm.weight.grad is not None and not fused_steps
    model.zero_grad()
    logits(model, steps=2)
    assert len(fused_steps) == 2
    model.set_expert_memory("1GB")
    logits(model, steps=2)
    assert len(fused_steps) == 2
    model.set_expert_memory(None)
    logits(model, steps=2)
    assert len(fused_steps) == 4
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["o_proj"], use_dora=True, init_lora_weights=False)
    )
    logits(tuned, steps=2)
    assert len(fused_steps) == 4


@needs_engine
def test_copies_and_pickles_find_their_own_weights(tmp_path_factory, fused_steps):
    model = load(tmp_path_factory, "v3", False)
    wanted = logits(model)
    other = copy.deepcopy(model)
    assert other.model.__dict__[SLOT] is None and pickle.loads(pickle.dumps(model.model.__dict__[SLOT])) is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(other), wanted)
    assert len(fused_steps) == 24


@needs_engine
def test_nan_in_a_weight_is_not_lost(tmp_path_factory):
    model = load(tmp_path_factory, "v3", False)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = torch.nan
    assert logits(model, rows=1)[1:].isnan().all()


# ---- the cache ----


def states(tokens, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, tokens, 6, generator=generator), torch.randn(batch, 1, tokens, 4, generator=generator)


def equal(layer, other):
    return torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_grows_like_a_dynamic_layer():
    ours, theirs = LatentLayer(), DynamicLayer()
    for turn, tokens in enumerate((5, 1, 1, 300, 1, 700, 1)):
        new = states(tokens, turn)
        assert all(torch.equal(a, b) for a, b in zip(ours.update(*new), theirs.update(*new), strict=True))
    assert ours.get_seq_length() == 1009


def test_one_more_token_copies_nothing():
    layer = LatentLayer()
    layer.update(*states(100))
    place = layer.keys.data_ptr()
    for turn in range(200):
        layer.update(*states(1, turn))
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 300


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.reset(),
    ],
    ids=["crop", "reorder", "repeat", "select", "reset"],
)
def test_crop_reorder_select_reset(change):
    ours, theirs = LatentLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(10))
    held = ours.keys, ours.keys.clone()
    for layer in (ours, theirs):
        change(layer)
    batch = theirs.keys.shape[0] if theirs.keys is not None else 2
    for turn in range(3):
        for layer in (ours, theirs):
            layer.update(*states(2, turn + 5, batch))
        assert equal(ours, theirs)
    assert torch.equal(*held)  # a tensor that somebody holds is not written to


def test_a_copy_grows_apart():
    layer = LatentLayer()
    layer.update(*states(10))
    other = copy.deepcopy(layer)
    layer.update(*states(1, 1))
    other.update(*states(1, 2))
    assert not torch.equal(layer.keys, other.keys)
    assert torch.equal(other.keys[:, :, 10:], states(1, 2)[0]) and torch.equal(layer.keys[:, :, 10:], states(1, 1)[0])


def test_gradients_and_other_dtypes_are_kept():
    layer = LatentLayer()
    first, second = states(3), [state.requires_grad_() for state in states(1, 1)]
    layer.update(*first)
    layer.update(*second)
    layer.keys.sum().backward()
    assert second[0].grad is not None
    with torch.no_grad():
        layer.update(*states(1, 2))
        layer.update(*(state.double() for state in states(1, 3)))
    assert layer.get_seq_length() == 6


def test_tensors_of_inference_mode_are_copied():
    layer = LatentLayer()
    with torch.inference_mode():
        layer.update(*states(3))
    layer.update(*states(1, 1))
    assert layer.get_seq_length() == 4 and torch.equal(layer.keys[:, :, :3], states(3)[0])


@pytest.mark.parametrize("looked", [False, True])
def test_views_are_those_of_the_rows_in_use_or_what_was_put_there(looked):
    """As after a step, which moves the layer on without making views of it."""
    layer = LatentLayer()
    layer.update(*states(5))
    layer.advance(3)
    if looked:
        assert layer.keys.shape[2] == 3 and layer.keys is layer.keys
    assert layer.get_seq_length() == 3 and torch.equal(layer.values, states(5)[1][:, :, :3])
    layer.keys = None
    assert layer.keys is None and layer.values.shape[2] == 3


def test_only_plain_caches_are_changed(one_model):
    config = one_model.config
    latents = torch.randn(1, 1, 4, config.kv_lora_rank), torch.randn(1, 1, 4, config.qk_rope_head_dim)
    cache = DynamicCache(config=config)
    cache.update(*latents, 0)
    before = cache.layers[0].keys.clone()
    assert prepare_cache(cache, config, 1) == 4 and type(cache.layers[0]) is LatentLayer
    assert torch.equal(cache.layers[0].keys, before)
    empty = DynamicCache()
    assert prepare_cache(empty, config, 1) == 0
    empty.update(*latents, 0)
    assert type(empty.layers[0]) is LatentLayer

    class Mine(DynamicCache):
        pass

    mine = Mine(config=config)
    assert prepare_cache(mine, config, 1) == 0 and type(mine.layers[0]) is DynamicLayer


# ---- when the engine runs layers, and when it does not ----


def test_layers_run_natively_for_few_tokens_without_gradients_alone(tmp_path, monkeypatch):
    """What is called of C: the layers of a step as one, a few tokens layer by layer, and nothing where it may not."""
    write_release(tmp_path / "v3", SHAPES["v3"](), fp8=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v3", dtype=torch.bfloat16)
    called, call = [], _native.call
    monkeypatch.setattr(_native, "call", lambda name, *given: called.append(name) or call(name, *given))

    def layers_run(tokens: int) -> bool:
        called.clear()
        model(torch.arange(3, 3 + tokens)[None])
        return "dsm_moe" in called or "dsm_step" in called

    gate = model.model.layers[-1].mlp.gate.weight
    with torch.no_grad():
        assert layers_run(1) and layers_run(8)
        assert not layers_run(9)
        with use_backend("reference"):
            assert not layers_run(1) and not called
        with torch.autocast("cpu", torch.bfloat16):
            assert not layers_run(1)
        gate.requires_grad_()
        assert layers_run(1)
    try:
        assert not layers_run(1)
    finally:
        gate.requires_grad_(False)
