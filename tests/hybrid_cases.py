"""Experts apart from a device, on a device written in Python: run by test_hybrid.py, in a process of their own."""

import fake_device
import pytest
import torch
from fake_device import Memory
from releases import COMMON, SHAPES, V3, write_release
from test_int4_release import write_int4
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_deepseek_moe import DeepseekV3Config
from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.conversion import _job, _table
from modeling_deepseek_moe.conversion._conversion import Options
from modeling_deepseek_moe.hybrid import held as held_module
from modeling_deepseek_moe.hybrid import placement
from modeling_deepseek_moe.hybrid.costs import Rates
from modeling_deepseek_moe.hybrid.layer import HybridMoE
from modeling_deepseek_moe.hybrid.placement import DEVICE_WORKSPACE, Sizes
from modeling_deepseek_moe.hybrid.slots import expert_bytes
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesMatrices
from modeling_deepseek_moe.quantized.mapped import MappedExperts

DEVICE = fake_device.NAME
LIBRARIES = fake_device.register()
APART = {"": f"{DEVICE}:0", "model.layers.*.mlp.experts": "cpu"}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
EXPERTS = 2 * 16  # of two layers


@pytest.fixture(scope="module", params=[True, False], ids=["fp8", "bf16"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("release")
    write_release(path, SHAPES["v3"](), fp8=request.param)
    return path


@pytest.fixture(autouse=True)
def definition():
    """One kernel for all: what each operation is defined by."""
    Memory.limit = None
    with use_backend("reference"), torch.no_grad():
        yield
    Memory.limit = None


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **how)


def is_quantized(folder) -> bool:
    return "quantization_config" in (folder / "config.json").read_text()


def resident(folder):
    """The model in one memory: for codes that of the device, whose kernels are the same; plain experts have others there."""
    return load(folder, device_map=f"{DEVICE}:0") if is_quantized(folder) else load(folder)


def same(found, wanted, folder) -> bool:
    """Up to rounding: on the device experts are computed in plain torch, on the CPU by the engine."""
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def logits(model):
    return model(IDS.to(model.device)).logits.cpu()


def texts(model):
    ids = IDS.to(model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).cpu()


def size_of(model) -> int:
    return expert_bytes(model.model.layers[1].mlp.experts)


def test_a_device_refuses_tensors_of_another():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


def test_experts_apart_give_the_bits_of_the_model_in_memory(folder):
    plain, model = resident(folder), load(folder, device_map=APART)
    layer = model.model.layers[1].mlp
    assert type(layer) is HybridMoE and type(layer.experts) in (MappedExperts, DeepseekExperts)
    apart = {name for name, p in model.named_parameters() if p.device.type == "cpu"}
    assert all(".mlp.experts." in name for name in apart)
    assert same(logits(model), logits(plain), folder)
    assert torch.equal(texts(model), texts(plain))
    model.to(f"{DEVICE}:0")  # again: experts stay
    assert same(logits(model), logits(plain), folder)


def test_a_token_takes_hidden_states_across_and_no_weights(folder):
    model = load(folder, device_map=APART)
    hidden = torch.randn(3, 1, 64).to(DEVICE)
    Memory.to_device = Memory.from_device = 0
    model.model.layers[1].mlp(hidden)
    assert Memory.to_device == 3 * 64 * 4  # the result
    assert Memory.from_device == 3 * (64 * 4 + 4 * (8 + 4))  # hidden states, indices and weights of four experts


def test_the_cpu_computes_with_its_engine(folder):
    plain, model = load(folder), load(folder, device_map=APART)
    layer, hidden = model.model.layers[1].mlp, torch.randn(3, 64)
    chosen = [tensor.cpu() for tensor in layer.gate(hidden.to(DEVICE))[:0:-1]]
    with use_backend("auto"):
        pending = layer.places.begin(*(tensor.to(DEVICE) for tensor in (hidden, *chosen)))
        found = layer.places.finish(layer.layer_idx, layer.experts, pending).cpu()
        assert torch.equal(found, plain.model.layers[1].mlp.experts(hidden, *chosen))


def test_all_experts_held(folder):
    plain, model = resident(folder), load(folder, device_map=APART)
    model.set_expert_memory(gpu="1GB", compute="cpu")
    assert model.gpu_expert_stats().held_bytes == EXPERTS * size_of(model)
    Memory.from_device = 0
    assert same(logits(model), logits(plain), folder)
    model.set_expert_memory(gpu=None)
    assert model.gpu_expert_stats() is None
    assert same(logits(model), logits(plain), folder)


def test_half_of_the_experts_held_are_those_used_most(folder, monkeypatch):
    monkeypatch.setattr(held_module, "REVIEW", 1)
    plain, model = resident(folder), load(folder, device_map=APART)
    logits(model)
    counts = model.model.layers[1].mlp.places.counts
    wanted = set(counts.most_used(EXPERTS // 2))
    model.set_expert_memory(gpu=EXPERTS // 2 * size_of(model), compute="cpu")
    places = model.model.layers[1].mlp.places
    assert places.held.slots.held() == wanted
    for _ in range(2):  # the second time others may be held
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    layer, unused = 1, next(key for key in counts.most_used(EXPERTS)[::-1] if key[0] == 1)
    counts.add(layer, torch.full((1000,), unused[1]))
    assert unused not in places.held.slots.held()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert unused in places.held.slots.held()


@pytest.mark.parametrize("count", [5, EXPERTS])
def test_experts_pass_through_the_device(folder, count):
    plain, model = resident(folder), load(folder, device_map=APART)
    model.set_expert_memory(gpu=count * size_of(model), compute="gpu")
    wanted = logits(plain)
    assert same(logits(model), wanted, folder)
    first = model.gpu_expert_stats(reset=True)
    assert first.misses and first.bytes_copied == first.misses * size_of(model)
    assert first.evictions == max(0, first.misses - count)
    assert first.held_bytes == min(count, first.misses) * size_of(model)
    assert same(logits(model), wanted, folder)
    again = model.gpu_expert_stats()
    assert (again.hits == first.misses and not again.misses) if count == EXPERTS else again.misses


def test_a_long_prompt_passes_where_that_is_faster(folder):
    plain, model = resident(folder), load(folder, device_map=APART)
    places = model.model.layers[1].mlp.places
    model.set_expert_memory(gpu=8 * size_of(model), compute="gpu")
    places.computes_all, places.rates = False, Rates(1.0, 1.0, 1e12, 1e15)
    texts(model)
    copied = model.gpu_expert_stats(reset=True).bytes_copied
    assert copied  # the prompt of 18 tokens
    with torch.no_grad():
        model(IDS[:, :1].to(DEVICE))
    assert not model.gpu_expert_stats().bytes_copied  # two tokens
    places.rates = Rates(1e12, 1e15, 1.0, 1.0)
    assert same(logits(model), logits(plain), folder)
    assert not model.gpu_expert_stats().bytes_copied


def test_an_error_in_a_copy_loses_nothing(folder, monkeypatch):
    plain, model = resident(folder), load(folder, device_map=APART)
    model.set_expert_memory(gpu=6 * size_of(model), compute="gpu")
    slots = model.model.layers[1].mlp.places.passing
    put, calls = slots._copies.put, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise CheckpointError("shard: found a truncated file")
        return put(*arguments)

    monkeypatch.setattr(slots._copies, "put", failing)
    with pytest.raises(CheckpointError, match="truncated"):
        logits(model)
    assert len(slots.held()) == 2
    assert same(logits(model), logits(plain), folder)


def test_budgets_that_cannot_be(folder):
    model = load(folder, device_map=APART)
    size = size_of(model)
    with pytest.raises(ValueError, match=rf"is too small: the least is {4 * size:,} bytes, the 4 experts of a layer"):
        model.set_expert_memory(gpu=4 * size - 1)
    wanted, used = logits(model), Memory.used()
    Memory.limit = used + 2 * size
    with pytest.raises(torch.OutOfMemoryError, match=r"found too little free on fake:0 .*wanted a smaller gpu="):
        model.set_expert_memory(gpu=8 * size)
    Memory.limit = None
    assert Memory.used() == used and model.gpu_expert_stats() is None
    assert same(logits(model), wanted, folder)
    with pytest.raises(ValueError, match="compute='both' is not one of"):
        model.set_expert_memory(gpu="1GB", compute="both")
    with pytest.raises(ValueError, match="found no budget"):
        model.set_expert_memory()
    with pytest.raises(ValueError, match="found no experts apart from an accelerator"):
        load(folder).set_expert_memory(gpu="1GB")


def test_int4_experts(tmp_path):
    """Apart, half of them held, and passing through."""
    write_int4(tmp_path / "int4", SHAPES["v3"]())
    plain, model = resident(tmp_path / "int4"), load(tmp_path / "int4", device_map=APART)
    assert type(model.model.layers[1].mlp.experts) is MappedExperts
    wanted = logits(plain)
    assert same(logits(model), wanted, None)
    for compute, count in (("cpu", EXPERTS // 2), ("gpu", 5)):
        model.set_expert_memory(gpu=count * size_of(model), compute=compute)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
        assert model.gpu_expert_stats().misses


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_bitsandbytes_experts(tmp_path, kind):
    """Codes made of a bf16 checkpoint lie in memory, and those of a saved model, or of ``convert to-4bit``, in its files; the
    device has no kernels of bitsandbytes for the other layers, which stay plain here."""
    bnb_models = pytest.importorskip("bnb_models")
    sizes = bnb_models.SIZES | {"moe_intermediate_size": 64, "num_hidden_layers": 2}
    write_release(tmp_path / "bf16", DeepseekV3Config(**(COMMON | V3 | sizes)))
    wish = bnb_models.wish(
        kind, llm_int8_skip_modules=["lm_head", "model.layers.0", ".*self_attn", ".*shared_experts"]
    )
    load(tmp_path / "bf16", quantization_config=wish).save_pretrained(tmp_path / "saved")
    forms = [("bf16", {"quantization_config": wish}, "gate_codes"), ("saved", {}, "Mapped")]
    if kind == "nf4":
        options = Options(format="nf4", keep="attention,dense,shared")
        _job.run(_table.make_job("to-4bit", tmp_path / "bf16", options), tmp_path / "made")
        forms.append(("made", {}, "Mapped"))
    for folder, settings, form in forms:
        wanted = logits(load(tmp_path / folder, **settings))
        model = load(tmp_path / folder, device_map=APART, **settings)
        layer = model.model.layers[1].mlp
        assert type(layer) is HybridMoE and isinstance(layer.experts, BitsAndBytesMatrices)
        assert hasattr(layer.experts, form) or type(layer.experts).__name__.startswith(form)
        assert {p.device.type for p in model.parameters()} - {"cpu"} == {DEVICE}
        assert all(".mlp.experts." in name for name, p in model.named_parameters() if p.device.type == "cpu")
        assert torch.equal(logits(model), wanted)
        with pytest.raises(ValueError, match=r"found \w+Experts, wanted plain or released"):
            model.set_expert_memory(gpu="1GB")
        assert torch.equal(logits(model), wanted)


def test_memory_that_ends_while_loading(folder):
    used = Memory.used()
    Memory.limit = used + 60_000
    with pytest.raises(
        torch.OutOfMemoryError, match=r"exhausted while loading, nothing of the model is kept.*experts"
    ):
        load(folder, device_map=f"{DEVICE}:0")
    assert Memory.used() == used


def test_auto_leaves_experts_on_the_cpu(folder, monkeypatch):
    sizes = Sizes.of(parameter_breakdown(AutoConfig.from_pretrained(folder)), 4)
    room = DEVICE_WORKSPACE + sizes.rest + sizes.cache
    monkeypatch.setattr(placement, "get_max_memory", dict)  # accelerate's knows no device of this kind
    model = load(folder, device_map="auto", max_memory={0: room, "cpu": room})
    assert isinstance(model.model.layers[1].mlp, HybridMoE) and model.device.type == DEVICE
    assert same(logits(model), logits(resident(folder)), folder)


def test_saving(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "plain")
    model = load(folder, device_map=APART)
    # no tensors of a class of its own, as those of this device are
    tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "apart", state_dict=tensors)
    plain, apart = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "apart"))
    assert plain == apart
