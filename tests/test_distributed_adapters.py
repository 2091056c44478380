"""LoRA of layers that ranks divide: outputs, gradients and the saved adapter of one process; what peft cannot divide is refused."""

import pytest
from plans_harness import load, observe, run_ranks
from releases import SHAPES, V3, write_release
from test_distributed_plans import EP, WHOLE_LATENTS, WIDE, check_refused, check_same, check_saved

from modeling_deepseek_moe import DeepseekV3Config

pytestmark = pytest.mark.slow

HEADS = ["q_b_proj", "kv_b_proj", "o_proj"]
MLPS = ["mlp.up_proj", "mlp.down_proj", "shared_experts.gate_proj", "shared_experts.down_proj"]
# name → release, targets, plan
SAME = {
    "heads": ("v3-mtp", HEADS, {"tp_size": 2}),
    "queries": ("v2-lite", ["q_proj", "kv_b_proj"], {"tp_size": 2}),
    "mlps": ("v3-mtp", MLPS, {"tp_size": 2}),
    "embedding": ("v3-mtp", ["embed_tokens"], {"tp_size": 2}),
    "whole-latents": ("v3-mtp", ["q_a_proj"], {"tp_size": 2, "tp_plan": WHOLE_LATENTS}),
    "experts-divided": ("v3-mtp", HEADS, EP),
    "experts-alone": ("v3-mtp", HEADS, EP | {"tp_plan": {}}),
    "fsdp-ep": ("v3-mtp", HEADS, {"fsdp_size": 2, "ep_size": 2}),
}
TP, LORA = {"tp_size": 2}, {"target_modules": ["q_b_proj"]}
# name → release, plan, adapter, what all ranks say
REFUSED = {
    "experts": (
        "v3-mtp",
        TP,
        {"target_parameters": ["mlp.experts.down_proj"]},
        "tp_size=2.*an adapter of routed experts",
    ),
    "latents": (
        "v3-mtp",
        TP,
        {"target_modules": ["kv_a_proj_with_mqa"]},
        "0.self_attn.kv_a_proj_with_mqa: found a layer under the rule 'deepseek_moe_kv_latent' among target_modules",
    ),
    "whole-latents": (  # whose k_pe has the gradients of a rank's own heads
        "v3-mtp",
        TP | {"tp_plan": WHOLE_LATENTS},
        {"target_modules": ["kv_a_proj_with_mqa"]},
        "under the rule 'mla_kv_a_proj' .*wanted one under colwise, rowwise, replicate",
    ),
    "gathered": ("v3-mtp", TP, {"target_modules": ["eh_proj"]}, "eh_proj: found .* the rule 'colwise_gather_output'"),
    "method": (
        "v3-mtp",
        TP,
        LORA | {"kind": "LoHaConfig"},
        "tp_size=2, ep_size=1: found an adapter of LOHA, wanted LoRA",
    ),
    "variant": ("v3-mtp", TP, LORA | {"use_dora": True}, "found use_dora=True, which looks at weights"),
    "copies": ("v3-mtp", TP, LORA | {"modules_to_save": ["lm_head"]}, "lm_head: found .*modules_to_save=.'lm_head'"),
    "codes": ("fp8", TP, LORA, "found torch.float8_e4m3fn codes that several ranks have parts of"),
}
IN_TWO_WAYS = {
    "tp-fsdp": ("v3-mtp", {"tp_size": 2, "fsdp_size": 2}, LORA, "tp_size=2: found an adapter, which peft would make"),
    "hsdp": (
        "v3-mtp",
        {"fsdp_size": 2, "dp_replicate_size": 2},
        LORA,
        "dp_replicate_size=2, tp_size=1: found an adapter",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for kind in ("v3-mtp", "v2-lite"):
        write_release(root / kind, SHAPES[kind]())
    v3 = V3 | {"q_lora_rank": 128, "n_group": 2, "topk_group": 1}
    write_release(root / "fp8", DeepseekV3Config(**WIDE, **v3), fp8=True)
    for name, (kind, targets, _) in SAME.items():
        settings = {"target_modules": targets, "init_lora_weights": False}
        load({"release": root / kind, "adapter": settings}, 0).save_pretrained(root / "start" / name)
    return root


def observed(name: str) -> dict:
    return {"grads": True, "save": True, "generate": name == "heads"}


def refused(root, cases: dict) -> dict[str, dict]:
    return {
        f"not-{name}": {"release": str(root / kind), "plan": plan, "adapter": adapter}
        for name, (kind, plan, adapter, _) in cases.items()
    }


@pytest.fixture(scope="module")
def two(root):
    cases = {
        name: {
            "release": str(root / kind),
            "plan": plan,
            "adapted": str(root / "start" / name),
            "observe": observed(name),
        }
        for name, (kind, _, plan) in SAME.items()
    }
    own = {"load_adapter": str(root / "start" / "heads"), "observe": {"save": True, "generate": False}}
    cases["own"] = {"release": str(root / "v3-mtp"), "plan": TP, **own}
    return run_ranks(root / "two", 2, cases | refused(root, REFUSED))


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_adapt_as_one(root, two, name):
    """Logits, gradients, and the bytes of the adapter's file."""
    case = {"release": str(root / SAME[name][0]), "adapted": str(root / "start" / name)}
    wanted = observe(load(case, 0), root / "alone" / name, **observed(name))
    assert wanted["grads"] and all(gradient.any() for gradient in wanted["grads"].values())
    check_same(two[name], wanted)
    check_saved(root / "two" / name, root / "alone" / name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused(two, name):
    check_refused(two[f"not-{name}"], REFUSED[name][3])


def test_an_adapter_of_the_models_own_is_not_gathered_by_one_rank(two):
    check_refused(two["own"], "found an adapter of which each rank has a part, put in by the model's own load_adapter")


@pytest.mark.long
def test_adapters_of_what_is_divided_in_two_ways_are_refused(root):
    found = run_ranks(root / "four", 4, refused(root, IN_TWO_WAYS))
    for name, (*_, said) in IN_TWO_WAYS.items():
        check_refused(found[f"not-{name}"], said)
