"""LoRA on stacked experts in every way that they are stored, next to peft's dense differences on plain transformers' classes."""

import re
from collections import Counter

import pytest
import torch
from adapters import EXPERTS, IDS, MLP, adapted, dequantised, load, logits, plain, stacked
from releases import SHAPES, write_release
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.quantized.mapped import MappedExperts

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.tools

ROUTED = {"target_modules": [], "target_parameters": EXPERTS}
BASES = {"mapped": load, "stacked": stacked, "fp32": dequantised}
KINDS = {
    "experts": ROUTED,
    "down alone": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "rslora": {**ROUTED, "use_rslora": True},
    "patterns": {**ROUTED, "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 5}},
    "gaussian": {**ROUTED, "init_lora_weights": "gaussian"},
    "mlp": {"target_modules": MLP},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.experts\.(gate|up|down)_proj"},
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    parent = tmp_path_factory.mktemp("experts")
    write_release(parent / "fp8", SHAPES["v3"](), fp8=True)
    dequantised(parent / "fp8").save_pretrained(parent / "plain")
    return parent


def changed(model, seed=0):
    """The model with adapters that do something, the same ones for every model that has them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_outputs_gradients_and_files_are_those_of_plain_transformers(base, kind, releases, tmp_path):
    kind = {"init_lora_weights": True, "task_type": "CAUSAL_LM"} | kind
    theirs = adapted(
        plain(releases / "plain"), **kind | ({"target_modules": MLP[2:]} if kind is KINDS["regex"] else {})
    )
    ours = adapted(base(releases / "fp8"), **kind)
    named = [{name: p for name, p in model.named_parameters() if "lora_" in name} for model in (ours, theirs)]
    assert named[0].keys() == named[1].keys()
    if kind["target_modules"] != "all-linear":  # in which plain's router comes after its experts
        assert all(
            torch.equal(parameter, named[1][name]) for name, parameter in named[0].items()
        )  # drawn the same way
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    want = logits(changed(theirs))
    torch.testing.assert_close(logits(changed(ours)), want, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(want, logits(plain(releases / "plain")), atol=1e-2)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in named[0].items():
        wanted = named[1][name].grad
        assert (parameter.grad is None) == (wanted is None)
        assert wanted is None or (parameter.grad - wanted).norm() <= 1e-3 * wanted.norm(), name
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    keys = [set(safe_open(tmp_path / who / "adapter_model.safetensors", "pt").keys()) for who in ("ours", "theirs")]
    assert keys[0] == keys[1]
    for model, folder in ((base(releases / "fp8"), "theirs"), (plain(releases / "plain"), "ours")):
        back = peft.PeftModel.from_pretrained(model, tmp_path / folder).eval()
        torch.testing.assert_close(logits(back), want, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(base(releases / "fp8"), tmp_path / "ours").eval()), logits(ours)
    )


OTHERS = {
    "one of three": ({"target_modules": ["shared_experts.up_proj"]}, {"mlp.shared_experts.up_proj": 2}, None),
    "dense layers": (
        {"target_modules": ["mlp.gate_proj", "mlp.down_proj"]},
        {"mlp.gate_proj": 1, "mlp.down_proj": 1},
        None,
    ),
    "dora": (
        {"target_modules": [r"shared_experts.down_proj"], "use_dora": True},
        {"mlp.shared_experts.down_proj": 2},
        None,
    ),
    "regex": (
        {"target_modules": r".*layers\.1\.mlp\.shared_experts\.(gate|up)_proj"},
        {"mlp.shared_experts.gate_proj": 1, "mlp.shared_experts.up_proj": 1},
        None,
    ),
    "a slip": ({"target_modules": ["o_proj", "q_porj"]}, {"self_attn.o_proj": 3}, "q_porj: matches nothing"),
    "a slip in a stack": (
        {"target_modules": ["o_proj"], "target_parameters": ["experts.up_gate_proj"]},
        {"self_attn.o_proj": 3},
        "experts.up_gate_proj: matches nothing",
    ),
    "bare": (
        {"target_modules": ["down_proj"]},
        {"mlp.experts": 2},
        "down_proj: the routed experts.*not mlp.down_proj, shared_experts.down_proj",
    ),
    "layers": (
        {**ROUTED, "target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"self_attn.o_proj": 1, "mlp.experts": 4},
        "layers_to_transform: not the routed experts",
    ),
    "excluded": (
        {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"], "exclude_modules": ["experts"]},
        {"self_attn.o_proj": 3},
        "gate_proj: the routed experts",
    ),
    "excluded in a layer": (
        {**ROUTED, "target_modules": ["o_proj"], "exclude_modules": r".*layers\.1\.mlp\.experts"},
        {"self_attn.o_proj": 3, "mlp.experts": 2},
        None,
    ),
    "a stack excluded": (
        {**ROUTED, "target_modules": ["o_proj"], "exclude_modules": ["gate_proj", "up_proj"]},
        {"self_attn.o_proj": 3, "mlp.experts": 2},
        None,
    ),
}


@pytest.mark.parametrize("shape", ["v3", "kimi"])
@pytest.mark.parametrize(("kind", "wanted", "said"), OTHERS.values(), ids=OTHERS)
def test_names_mean_what_they_say_and_one_warning_lists_those_that_do_not(kind, wanted, said, shape, tmp_path, caplog):
    write_release(tmp_path, SHAPES[shape](), fp8=True)
    model = adapted(load(tmp_path), **kind)
    found = [name.split(".lora_A.")[0].split(".", 5)[5] for name, _ in model.named_parameters() if ".lora_A." in name]
    assert Counter(name.replace(".base_layer", "") for name in found) == wanted
    warnings = [record.message for record in caplog.records if "Targets of the adapter" in record.message]
    assert len(warnings) == (said is not None)
    assert said is None or re.search(said, warnings[0])
    model.save_pretrained(tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(load(tmp_path), tmp_path / "adapter").eval()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("shape", ["v3", "kimi"])
def test_a_regex_that_matches_nothing_is_refused(shape, tmp_path):
    write_release(tmp_path, SHAPES[shape](), fp8=True)
    model = load(tmp_path)
    with pytest.raises(ValueError, match=r"Target modules \.\*q_porj not found"):
        adapted(model, target_modules=".*q_porj")
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("shape", ["v3", "kimi"])
@pytest.mark.parametrize("excluded", [(), ["experts"], ["gate"]])
def test_all_linear_layers(excluded, shape, tmp_path):
    write_release(tmp_path, SHAPES[shape](), fp8=True)
    model = adapted(load(tmp_path), target_modules="all-linear", exclude_modules=excluded)
    parts = Counter(name.split(".", 5)[5].split(".")[1] for name, _ in model.named_parameters() if ".lora_A." in name)
    wanted = {name: 3 for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    assert parts == wanted | {name: n for name, n in (("gate", 2), ("experts", 4)) if name not in excluded}
    model.save_pretrained(tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(load(tmp_path), tmp_path / "adapter").eval()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_several_adapters(base, releases):
    model = changed(adapted(base(releases / "fp8"), **ROUTED))
    bare, first = logits(base(releases / "fp8")), logits(model)
    model.add_adapter("second", peft.LoraConfig(r=3, init_lora_weights=False, **ROUTED))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)
    rows = IDS.repeat(3, 1)
    with torch.no_grad():
        mixed = model(rows, adapter_names=["second", "__base__", "default"]).logits.float()
    for found, wanted in zip(mixed, (second, bare, first), strict=True):
        torch.testing.assert_close(found[None], wanted, rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    theirs = plain(releases / "plain")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, **ROUTED))
    theirs.add_adapter("second", peft.LoraConfig(r=3, **ROUTED))
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    theirs.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(both, logits(theirs.eval()), rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="same set of parameters"):
        model.add_adapter("third", peft.LoraConfig(target_modules=[], target_parameters=EXPERTS[:1]))
    assert torch.equal(logits(model.unload()), bare)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_few_tokens_are_as_many(base, tokens, releases):
    model = changed(adapted(base(releases / "fp8"), **ROUTED))
    with torch.no_grad():
        want = model(IDS).logits[:, :tokens]
        few = model(IDS[:, :tokens]).logits
        torch.testing.assert_close(few, want, rtol=1e-4, atol=1e-4)
        with use_backend("reference"):
            torch.testing.assert_close(model(IDS[:, :tokens]).logits, want, rtol=1e-4, atol=1e-4)
        # written past autograd, as moving averages are
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-2)
        assert not torch.allclose(model(IDS[:, :tokens]).logits, few, atol=1e-2)
        torch.testing.assert_close(model(IDS[:, :tokens]).logits, model(IDS).logits[:, :tokens], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [load, stacked])
def test_in_bf16_and_under_autocast(base, dtype, releases):
    want = logits(changed(adapted(plain(releases / "plain"), **ROUTED)))
    model = changed(adapted(base(releases / "fp8", dtype=dtype), **ROUTED))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = logits(model)
        loss = model(input_ids=IDS, labels=IDS).loss
    assert (found - want).abs().mean() < 0.05 * want.abs().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if "lora_" in name)


def test_what_looks_at_neurons_or_trains_stacks_beside_an_adapter_is_served(releases):
    model, theirs = (
        changed(adapted(load(releases / "plain"), **ROUTED)),
        changed(adapted(plain(releases / "plain"), **ROUTED)),
    )
    seen = []
    for one in (model, theirs):
        experts = one.base_model.model.model.layers[1].mlp.experts.get_base_layer()
        experts.act_fn.register_forward_hook(lambda module, args, out: seen.append(len(out)) or out * 0.5)
        for parameter in experts.parameters():
            parameter.requires_grad_(True)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-3, atol=1e-3)
    assert seen
    for one in (model, theirs):
        one(input_ids=IDS, labels=IDS).loss.backward()
    grads = [dict(one.base_model.model.model.layers[1].mlp.experts.named_parameters()) for one in (model, theirs)]
    for name, parameter in grads[0].items():
        torch.testing.assert_close(parameter.grad, grads[1][name].grad, rtol=1e-3, atol=1e-4)


UNFIT = [("use_dora", True), ("lora_dropout", 0.1), ("lora_bias", True)] + [
    ("init_lora_weights", value) for value in ("pissa", "olora", "orthogonal")
]


@pytest.mark.parametrize(("field", "value"), UNFIT)
def test_what_peft_has_not_for_stacks_is_refused_with_the_way_out(field, value, releases):
    kind = {"r": 2, field: value}
    with pytest.raises((ValueError, AttributeError)):  # of the stacks, which have no weight
        peft.get_peft_model(plain(releases / "plain"), peft.LoraConfig(**ROUTED, **kind))
    model = load(releases / "plain")
    with pytest.raises(ValueError, match=rf"experts: found {field}={value}.*attention and the shared experts alone"):
        peft.get_peft_model(model, peft.LoraConfig(**ROUTED, **kind))
    assert not hasattr(model, "peft_config")
    way_out = peft.LoraConfig(target_modules=["o_proj", "shared_experts.down_proj"], **kind)
    assert peft.get_peft_model(model, way_out).get_nb_trainable_parameters()[0] > 0


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_nothing_of_the_size_of_all_experts_is_made(base, tmp_path):
    config = SHAPES["v3"]()
    config.moe_intermediate_size = config.hidden_size = 128
    config.n_routed_experts, config.num_hidden_layers = 64, 2
    write_release(tmp_path, config, fp8=True)
    one_expert = 3 * 128 * 128
    model = changed(
        adapted(
            base(tmp_path),
            **ROUTED,
        )
    )
    with Largest() as largest:
        model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            model(IDS)
    assert largest.elements <= one_expert


@torch.no_grad()
def decoded(model):
    """Logits of the last of two tokens that are taken one by one after a prompt, which the engine runs in one call each."""
    cache = DynamicCache(config=model.config)
    model(IDS[:, :-3], **{CACHE_NAME: cache})
    return [model(IDS[:, place : place + 1], **{CACHE_NAME: cache}).logits for place in (-3, -2)][-1].float()


@pytest.mark.parametrize("base", [load, stacked])
def test_decoding_with_adapted_experts_is_one_call_that_sees_every_change(base, releases):
    model = changed(adapted(base(releases / "fp8", dtype=torch.bfloat16), **ROUTED))
    report = model.base_model.model.engine_report()
    if report.unavailable is None:
        assert report.runs_all and report.calls == 1

    def is_right():
        """Whether it is what the modules compute that are called one by one, which a hook makes of them."""
        found, wrappers = decoded(model), [layer.mlp.experts for layer in model.base_model.model.model.layers[1:]]
        handles = [wrapper.register_forward_hook(lambda *_: None) for wrapper in wrappers]
        assert torch.equal(decoded(model), found)
        for handle in handles:
            handle.remove()
        return found

    with torch.no_grad():
        want = model(IDS).logits[:, -2:-1].float()
    assert (decoded(model) - want).abs().mean() < 0.04 * want.abs().mean()
    first, bare = is_right(), decoded(base(releases / "fp8", dtype=torch.bfloat16))
    assert (first - bare).abs().mean() > 0.1 * bare.abs().mean()
    with model.disable_adapter():
        assert torch.equal(decoded(model), bare)
    assert torch.equal(is_right(), first)
    model.add_adapter("second", peft.LoraConfig(r=3, init_lora_weights=False, **ROUTED))
    assert torch.equal(is_right(), first)
    model.set_adapter("second")
    second = is_right()
    assert not torch.equal(second, first)
    for name, parameter in model.named_parameters():
        if "lora_A.second" in name:
            parameter.data.mul_(-1)
    assert not torch.equal(is_right(), second)
    model.base_model.set_adapter(["default", "second"])  # more than the engine has for one call
    is_right()
    model.set_adapter("default")
    assert torch.equal(is_right(), first)
    experts = model.base_model.model.model.layers[1].mlp.experts
    experts.scaling["default"] *= 2
    assert not torch.equal(is_right(), first)
    experts.scaling["default"] /= 2
    seen = []
    handle = experts.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    is_right()
    handle.remove()
    assert seen
    assert torch.equal(decoded(model), first)


def test_what_streaming_and_dequantising_cannot_do_is_said():
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(dsm.tiny_checkpoint())
    with pytest.raises(
        ValueError, match=r"dequantize\(\): found weights in 'fp8'.*FineGrainedFP8Config\(dequantize=True\)"
    ):
        model.dequantize()
    assert isinstance(model.model.layers[2].mlp.experts, MappedExperts)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
    with pytest.raises(ValueError, match=r"mapped experts with an adapter around them.*before the adapter is made"):
        model.set_expert_memory("8MB")
