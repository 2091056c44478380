"""The CPU engine's plan of a model: what runs natively between foreign things, with the bits of the layers, and when it is made again."""

import inspect
import re

import pytest
import torch
from engine_cases import needs_engine
from releases import SHAPES, write_release
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_deepseek_moe import attention, block, layers, modeling, mtp, use_backend
from modeling_deepseek_moe.engine.plan import SLOT, Plan
from modeling_deepseek_moe.moe import balance, experts, router, training_state
from modeling_deepseek_moe.moe import layer as moe_layer
from modeling_deepseek_moe.quantized.mapped import MappedExperts

pytestmark = needs_engine
STAGES = 3


@pytest.fixture(scope="module", params=[("v3", False), ("v3", True), ("v2", False)], ids=str)
def folder(request, tmp_path_factory):
    kind, fp8 = request.param
    path = tmp_path_factory.mktemp(kind)
    write_release(path, SHAPES[kind](), fp8=fp8)
    return path


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def logits(model, rows=2, steps=4, between=None) -> torch.Tensor:
    """Of a prompt, then of one token after the other; ``between`` is called before the third."""
    ids = torch.randint(3, 128, (rows, 9), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    found = [model(ids, cache=cache).logits[:, -1]]
    for step in range(steps):
        if between is not None and step == 2:
            between()
        found.append(model(torch.full((rows, 1), 5 + step), cache=cache).logits[:, -1])
    return torch.stack(found)


def native(model) -> int:
    """Stages that the engine ran in the last step."""
    base = next(module for module in model.modules() if isinstance(module, modeling.DeepseekMoeModel))
    plan = base.__dict__[SLOT]
    return sum(flag for stages in plan.stages for flag in stages.native())


def all_stages(model) -> int:
    return STAGES * model.config.num_hidden_layers


def with_dora(*targets):
    def attach(model):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, use_dora=True, r=4)
        ).eval()

    return attach


def with_hook(name):
    def attach(model):
        for layer in list(model.model.layers)[1:]:
            layer.get_submodule(name).register_forward_hook(lambda *_: None)
        return model

    return attach


def with_a_hooked_layer(model):
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)
    return model


def with_a_forward_of_its_own(model):
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    return model


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(model.model.layers[1].self_attn.kv_b_proj, accelerate.hooks.ModelHook())
    return model


FOREIGN = {  # stages of a layer that are lost, and of how many layers but the first
    "DoRA on o_proj": (with_dora("o_proj"), 1, "all"),
    "DoRA on kv_b_proj": (with_dora("kv_b_proj"), 2, "all"),
    "DoRA on kv_a_proj_with_mqa": (with_dora("kv_a_proj_with_mqa"), 2, "all"),
    "hook on the router": (with_hook("mlp.gate"), 1, "moe"),
    "hook on the experts": (with_hook("mlp.experts"), 1, "moe"),
    "hook on an activation": (with_hook("mlp.shared_experts.act_fn"), 1, "moe"),
    "hook on the experts' activation": (with_hook("mlp.experts.act_fn"), 1, "moe"),
    "hook on a norm": (with_hook("post_attention_layernorm"), 1, "moe"),
    "hook on attention": (with_hook("self_attn"), 2, "moe"),
    "hook on a layer": (with_a_hooked_layer, 3, "one"),
    "a forward of its own": (with_a_forward_of_its_own, 2, "one"),
    "accelerate's hook": (offloaded, 2, "one"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_rest_runs_natively_with_the_bits_of_the_layers(model, by_layers, name):
    attach, lost, where = FOREIGN[name]
    depth = model.config.num_hidden_layers
    layers = {"all": depth, "moe": depth - 1, "one": 1}[where]
    wanted_native = all_stages(model) - lost * layers
    model = attach(model)
    found = logits(model)
    assert native(model) == wanted_native
    assert torch.equal(found, by_layers(logits, model))
    assert (found[1:] - found[:1]).abs().max() > 0


def test_streamed_experts_leave_attention_native(folder, by_layers):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if not any(isinstance(module, MappedExperts) for module in model.modules()):
        with pytest.raises(ValueError, match="mapped"):
            model.set_expert_memory("1GB")
        return
    wanted = logits(model)
    model.set_expert_memory("1GB")
    found = logits(model)
    assert native(model) == all_stages(model) - 2  # layers with experts
    assert torch.equal(found, wanted)


CHANGES = {
    "a hook": lambda model: model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0),
    "a child": lambda model: setattr(model.model.layers[1].self_attn, "o_proj", Doubled(model.model.layers[1])),
    "a layer": lambda model: model.model.layers.__setitem__(1, Skipped()),
    "a tensor": lambda model: setattr(
        model.model.layers[1].input_layernorm, "weight", nn.Parameter(model.model.layers[1].input_layernorm.weight * 3)
    ),
    "its memory": lambda model: setattr(
        model.model.layers[1].post_attention_layernorm.weight,
        "data",
        model.model.layers[1].post_attention_layernorm.weight.data * 3,
    ),
    "a bias": lambda model: setattr(
        model.model.layers[1].self_attn.o_proj, "bias", nn.Parameter(torch.ones(64).bfloat16())
    ),
    "a forward": lambda model: setattr(model.model.layers[1].mlp, "forward", lambda x: x * 0),
    "a norm's epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 9.0),
    "experts a token": lambda model: setattr(model.model.layers[1].mlp.gate, "top_k", 1),
    "the experts' factor": lambda model: setattr(model.model.layers[1].mlp.gate, "routed_scaling_factor", 9.0),
    "the softmax scale": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 9.0),
    "the norm after the layers": lambda model: setattr(model.model, "norm", Tripled(model.model.norm)),
    "its weight": lambda model: setattr(model.model.norm, "weight", nn.Parameter(model.model.norm.weight * 3)),
    "a hook on it": lambda model: model.model.norm.register_forward_hook(lambda module, args, out: out * 3),
}


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer.self_attn.o_proj

    def forward(self, x):
        return 2 * self.layer(x)


class Tripled(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return 3 * self.norm(x)


class Skipped(nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_tokens_counts_from_the_next(model, by_layers, name):
    change = CHANGES[name]
    found = logits(model, between=lambda: change(model))
    again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.bfloat16).eval()
    wanted = by_layers(logits, again, between=lambda: change(again))
    unchanged = by_layers(
        logits, AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.bfloat16).eval()
    )
    assert torch.equal(found, wanted)
    assert torch.equal(found[:3], unchanged[:3]) and not torch.equal(found[3:], unchanged[3:])


def test_what_a_hook_holds_is_not_written_to(model):
    """The engine works on states of its own: those that a hook has seen stay as they were."""
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    copies = []
    model.model.layers[1].register_forward_hook(
        lambda module, args, out: copies.append((args[0].clone(), out.clone()))
    )
    logits(model)
    assert len(seen) == 5
    for (before, after), (before_copy, after_copy) in zip(seen, copies, strict=True):
        assert torch.equal(before, before_copy) and torch.equal(after, after_copy)


def test_the_plan_is_kept_from_token_to_token(model, monkeypatch):
    made, init = [], Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda self, *arguments: made.append(1) or init(self, *arguments))
    logits(model, steps=6)
    assert len(made) == 1
    logits(model, steps=6)
    assert len(made) == 2  # of the next prompt


# ---- the report ----


def test_report_of_a_plain_model(model):
    report = model.engine_report()
    assert report.runs_all and report.calls == 1
    assert str(report).splitlines() == [
        "layers.0-2.self_attn         native",
        "layers.0-2.self_attn.o_proj  native",
        "layers.0-2.mlp               native",
        "norm                         native",
        "lm_head                      native",
        "1 call of the engine for the layers of a token",
    ]


def test_report_names_what_is_foreign_and_why(model):
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)
    tuned = with_dora("o_proj")(model)
    lines = dict(tuned.engine_report().lines())
    assert lines["layers.0-2.self_attn"] is None
    reason = "runs LoRA of one adapter at a time, in fp32 or bf16, without dropout, a bias or a variant"
    assert lines["layers.0-2.self_attn.o_proj"] == reason
    assert lines["layers.1.mlp"] == "gate: cannot call the hooks of a DeepseekTopkRouter"
    assert lines["layers.0,2.mlp"] is None
    assert not tuned.engine_report().runs_all and tuned.engine_report().calls == 4


def test_the_norm_alone_is_no_call(model, by_layers):
    for layer in list(model.model.layers)[: model.config.num_hidden_layers]:
        layer.register_forward_pre_hook(lambda *_: None)
    report = model.engine_report()
    assert report.calls == 0 and dict(report.lines())["norm"] is None
    assert torch.equal(logits(model), by_layers(logits, model))


def test_report_without_an_engine(model):
    with use_backend("reference"):
        assert "reference" in model.engine_report().unavailable
    model.config._experts_implementation = "eager"
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts") and hasattr(layer.mlp.experts, "config"):
            assert "eager" in dict(model.engine_report().lines())["layers.1-2.mlp"]
    model.model.embed_tokens.half()
    assert "torch.float16" in dict(model.engine_report().lines())["layers.0-2.self_attn"]


# ---- the model is plain ----


def test_every_linear_layer_is_torchs_own(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize > 1:
            assert type(module) is nn.Linear, name
            assert "forward" not in module.__dict__, name


def test_nothing_of_the_engine_is_in_a_module(model):
    """Attributes that name a backend, an address or a reason stay out of the modules' own text."""
    words = re.compile(r"backend|refus|unsupported|address|avx|amx|\bCPU\b|_native|_dispatch|data_ptr")
    for module in (modeling, attention, block, layers, mtp, balance, experts, moe_layer, router, training_state):
        text = re.sub(r'""".*?"""|#[^\n]*', "", inspect.getsource(module), flags=re.DOTALL)
        found = words.findall(text.replace("_supports_attention_backend", ""))  # transformers' word
        assert not found, (module.__name__, found)
