"""LoRA on linear layers and routers in the CPU engine's own steps: peft's definition, what changes between two tokens, and what is left to peft."""

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
import torch  # noqa: E402
from bnb_models import SIZES, wish  # noqa: E402
from engine_cases import distance, every_isa, needs_engine  # noqa: E402
from next_token_cases import decoding, load, note_steps, steps  # noqa: E402
from releases import COMMON, SHAPES, V3, write_release  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from modeling_deepseek_moe import DeepseekV3Config, use_backend  # noqa: E402
from modeling_deepseek_moe.engine.plan import SLOT  # noqa: E402

pytestmark = [needs_engine, pytest.mark.tools]
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {name: [name] for name in ATTENTION} | {
    "q_proj": ["q_proj"],
    "attention": list(ATTENTION),
    "shared experts": [f"shared_experts.{name}" for name in MLP],
    "a shared up": ["shared_experts.up_proj"],
    "dense": [f"layers.0.mlp.{name}" for name in MLP],
    "head": ["lm_head"],
    "all linear": "all-linear",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Releases of which every expert is chosen, so that no rounding chooses another."""
    made = {}

    def of(kind: str, fp8: bool):
        if (kind, fp8) not in made:
            path = made[kind, fp8] = tmp_path_factory.mktemp(kind)
            config = SHAPES[kind]()
            config.num_experts_per_tok, config.topk_group = config.n_routed_experts, config.n_group
            write_release(path, config, fp8=fp8)
        return made[kind, fp8]

    return of


def adapted(model, targets, seed=0, **kind):
    torch.manual_seed(seed)
    given = (
        {"target_modules": targets}
        if targets != "router"
        else {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    )
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 5, "init_lora_weights": False} | given | kind)).eval()


def stages(model) -> list:
    """Why the engine did not run the stages of each layer in the last step."""
    return model.get_base_model().model.__dict__[SLOT].stages


# ---- peft's definition ----


def has(kind: str, name: str) -> bool:
    return (name == "q_proj") == (kind == "v2-lite") if name in ("q_proj", "q_a_proj", "q_b_proj") else True


def cases(*names: str) -> list:
    return [(kind, name) for kind in ("v3", "v2-lite") for name in names if has(kind, name)]


@pytest.mark.parametrize(("kind", "name"), cases(*ATTENTION, "q_proj", "attention", "dense"))
def test_is_what_peft_computes(folder, kind, name, by_layers):
    """In fp32 on FP8 weights, where nothing is rounded on the way; routers, and so the layers of experts, are torch's there."""
    model = AutoModelForCausalLM.from_pretrained(folder(kind, True), dtype=torch.float32).eval()
    targets = [one for one in TARGETS[name] if has(kind, one)]
    tuned = adapted(model, targets)
    with tuned.disable_adapter():
        plain = steps(tuned)
    found = steps(tuned)
    first, second = stages(tuned)[:2]
    assert first.mlp is None and second.attention is None and second.output is None
    wanted = by_layers(steps, tuned)
    assert distance(plain, wanted) > 1e-3
    assert distance(found, wanted) < 2e-5


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("kind", "name"), cases("shared experts", "a shared up", "router", "head", "all linear"))
def test_in_bf16_is_as_near_to_fp32_as_peft(folder, kind, name, fp8, by_layers):
    exact = AutoModelForCausalLM.from_pretrained(folder(kind, fp8), dtype=torch.float32).eval()
    wanted = by_layers(steps, adapted(exact, TARGETS.get(name, name)))
    tuned = adapted(load(folder(kind, fp8)), TARGETS.get(name, name))
    found, by_peft = steps(tuned), by_layers(steps, tuned)
    with tuned.disable_adapter():
        assert distance(steps(tuned), wanted) > 3 * distance(found, wanted)
    assert all(stage == (None,) * 5 for stage in stages(tuned))
    assert distance(found, wanted) < 1.5 * distance(by_peft, wanted)


@every_isa
def test_every_instruction_set_adds_the_same(folder, isa, by_layers):
    tuned = adapted(load(folder("v3", True)), "all-linear")
    with use_backend(isa):
        assert distance(steps(tuned), by_layers(steps, tuned)) < 0.03


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_codes_of_bitsandbytes_have_adapters_too(kind, tmp_path, by_layers):
    every = {"num_experts_per_tok": COMMON["n_routed_experts"], "topk_group": V3["n_group"]}
    write_release(tmp_path, DeepseekV3Config(**(COMMON | V3 | SIZES | every | {"moe_intermediate_size": 192})))
    wished = wish(kind, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=wished).eval()
    tuned = adapted(model, [*ATTENTION, *TARGETS["shared experts"]])
    found = steps(tuned)
    assert all(stage == (None,) * 5 for stage in stages(tuned))
    assert distance(found, by_layers(steps, tuned)) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 19])
def test_matrices_of_any_rank_and_dtype(folder, rank, dtype, by_layers):
    """They are products in fp32 whatever they are kept in."""
    model = AutoModelForCausalLM.from_pretrained(folder("v3", True), dtype=torch.float32).eval()
    tuned = adapted(model, list(ATTENTION), r=rank, lora_alpha=rank)
    matrices = [parameter for name, parameter in tuned.named_parameters() if "lora_" in name]
    for parameter in matrices:
        parameter.data = parameter.data.bfloat16().float()

    def keep_in_dtype(_):
        for parameter in matrices:
            parameter.data = parameter.data.to(dtype)

    wanted = by_layers(steps, tuned, 3)
    assert distance(steps(tuned, 3, between=keep_in_dtype), wanted) < 2e-5
    assert stages(tuned)[1].attention is None


def test_a_token_goes_through_in_one_call(folder, monkeypatch):
    taken = note_steps(monkeypatch)
    tuned = adapted(load(folder("v3", True)), "all-linear")
    steps(tuned)
    assert taken == [10, 11, 12, 13]
    report = tuned.engine_report()
    assert report.runs_all and report.calls == 1


# ---- what changes between two tokens ----


def first_lora(model) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.self_attn.o_proj"))


def write_by_data(model) -> None:
    first_lora(model).lora_B["default"].weight.data.neg_()


def load_another(model) -> None:
    own = peft.get_peft_model_state_dict(model)
    other = {name: -values if "lora_A" in name else values for name, values in own.items()}
    peft.set_peft_model_state_dict(model, other)


CHANGES = {
    "a write by .data": write_by_data,
    "tensors of another adapter": load_another,
    "another adapter is active": lambda model: model.set_adapter("other"),
    "two are active": lambda model: model.base_model.set_adapter(["default", "other"]),
    "none is": lambda model: model.base_model.disable_adapter_layers(),
    "it is merged": lambda model: model.base_model.merge_adapter(["default"]),
    "its scale": lambda model: first_lora(model).scale_layer(3.0),
    "a matrix of its own": lambda model: setattr(
        first_lora(model).lora_A["default"], "weight", nn.Parameter(-first_lora(model).lora_A["default"].weight.data)
    ),
    "a hook on a matrix": lambda model: (
        first_lora(model).lora_A["default"].register_forward_hook(lambda module, given, out: -out)
    ),
    "a hook on the layer": lambda model: first_lora(model).register_forward_hook(lambda module, given, out: -out),
    "it is deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "it is trained, with dropout": lambda model: model.train(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_tokens_counts_from_the_next(folder, name, by_layers):
    def tuned():
        model = AutoModelForCausalLM.from_pretrained(folder("v3", False), dtype=torch.bfloat16).eval()
        found = adapted(model, list(ATTENTION), lora_dropout=0.5)
        torch.manual_seed(7)
        found.add_adapter(
            "other", peft.LoraConfig(r=3, init_lora_weights=False, target_modules=["o_proj", "q_b_proj"])
        )
        return found.eval()

    def run(model):
        torch.manual_seed(3)
        return steps(model, between=CHANGES[name])

    unchanged = steps(tuned())
    found, wanted = run(tuned()), by_layers(run, tuned())
    assert distance(found[:4], unchanged[:4]) == 0
    assert name == "it is merged" or distance(found[4:], unchanged[4:]) > 0.05
    assert distance(found, wanted) < 0.05


def test_a_batch_with_an_adapter_for_each_sequence_is_pefts(folder, by_layers):
    tuned = adapted(load(folder("v3", False)), ["o_proj"])
    names = {"adapter_names": lambda rows, _: ["default", "__base__"][:rows]}
    found = steps(tuned, **names)
    assert distance(found, by_layers(steps, tuned, **names)) == 0
    assert distance(found[1:, 0], steps(tuned)[1:, 0]) < 0.05 < distance(found[1:, 1], steps(tuned)[1:, 1])


# ---- what is left to peft ----


LEFT = {
    "DoRA": {"use_dora": True},
    "a bias": {"lora_bias": True},
    "fp16": {},
}


@pytest.mark.parametrize("name", LEFT)
def test_other_adapters_are_called_as_modules(folder, name, by_layers):
    tuned = adapted(load(folder("v3", False)), ["o_proj"], **LEFT[name])
    if name == "fp16":
        first_lora(tuned).lora_A["default"].half(), first_lora(tuned).lora_B["default"].half()
    found = steps(tuned)
    assert "runs LoRA of one adapter at a time" in str(tuned.engine_report())
    assert distance(found, by_layers(steps, tuned)) == 0


def test_matrices_that_do_not_fit_are_an_error(folder):
    tuned = adapted(load(folder("v3", False)), ["o_proj"])
    cache = decoding(tuned.get_base_model())
    half = first_lora(tuned).lora_A["default"].weight.data[:, ::2].contiguous()
    first_lora(tuned).lora_A["default"].weight = nn.Parameter(half)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        tuned(torch.tensor([[7]]), cache=cache)
    assert "adapter: needs A [r, " in str(tuned.engine_report())
