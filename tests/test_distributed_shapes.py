"""Every plan for every shape of release: on two processes what one finds: counts and biases too, and the same bytes saved."""

from functools import cache

import pytest
from plans_harness import DIMS, attention_of, load, observe, run_ranks
from releases import SHAPES, write_release
from test_distributed_plans import EP, check_same, check_saved

from modeling_deepseek_moe import DeepseekV3Config

pytestmark = [pytest.mark.slow, pytest.mark.long]

KINDS = ("v3", "v2-lite", "moonlight")
PLANS = {
    "tp": {"tp_size": 2},
    "ep-all-to-all": EP | {"tp_plan": {}, "ep_implementation": "all_to_all"},
    "ep-all-reduce": EP | {"tp_plan": {}, "ep_implementation": "all_reduce"},
    "tp-ep-all-to-all": EP | {"ep_implementation": "all_to_all"},
    "tp-ep-all-reduce": EP | {"ep_implementation": "all_reduce"},
    "fsdp": {"fsdp_size": 2},
    "fsdp-ep": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
}


def observed(kind: str, plan: str = "") -> dict:
    # a pipeline has no gradients, and its ranks have other layers; DeepSeek-V2 has no biases
    return {} if plan == "pp" else {"grads": True, "save": True, "balance": kind != "v2-lite"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for kind in KINDS:
        write_release(root / kind, SHAPES[kind]())
    return root


@pytest.fixture(scope="module")
def two(root):
    cases = {
        f"{kind}-{name}": {"release": str(root / kind), "plan": plan, "observe": observed(kind, name)}
        for kind in KINDS
        for name, plan in PLANS.items()
    }
    return run_ranks(root / "two", 2, cases)


@pytest.fixture(scope="module")
def alone(root):
    @cache
    def of(kind: str) -> dict:
        return observe(load({"release": str(root / kind)}, 0), root / "alone" / kind, **observed(kind))

    return of


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_find_and_save_what_one_does(root, two, alone, kind, plan):
    left = ("grads", "loads", "biases") if plan == "pp" else ()
    wanted = {name: found for name, found in alone(kind).items() if name not in left}
    check_same(two[f"{kind}-{plan}"], wanted)
    if plan != "pp":
        check_saved(root / "two" / f"{kind}-{plan}", root / "alone" / kind)


def test_the_memory_of_v3s_attention_halves_in_processes(root):
    """One layer of the release's dimensions in fp32: 748 MB on one process."""
    small = {"vocab_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_nextn_predict_layers": 0}
    settings = {name: value for name, value in DIMS["DeepSeek-V3"].items() if name != "model_type"}
    write_release(root / "attention", DeepseekV3Config(**settings, **small, first_k_dense_replace=1))
    runs = {}
    for ranks in (1, 2):
        case = {"plan": {"tp_size": ranks}} if ranks > 1 else {}
        # the first one imports what is imported on the way
        cases = {
            name: case | {"release": str(root / name), "observe": {"generate": False}} for name in ("v3", "attention")
        }
        runs[ranks] = run_ranks(root / f"memory-{ranks}", ranks, cases)["attention"]
    assert runs[1][0]["resident"] == pytest.approx(2 * attention_of("DeepSeek-V3"), abs=30e6)
    for rank in runs[2]:
        assert rank["resident"] == pytest.approx(attention_of("DeepSeek-V3"), abs=30e6)
