"""Models over 2, 3 and 4 processes by transformers' plans give what one process gives; the tables of the plans."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import write_family
from plans_harness import DIMS, attention_of, free_port, load, observe, run_ranks
from releases import COMMON, SHAPES, V3, write_release
from safetensors.torch import load_file, save_file
from test_int4_release import write_int4
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import DeepseekV2Config, DeepseekV3Config
from modeling_deepseek_moe.distributed.checks import Whole, check
from modeling_deepseek_moe.distributed.latents import LatentParallel

WIDE = COMMON | {  # sides that are whole blocks of 128 on each of four ranks
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
WHOLE_LATENTS = {
    "model.layers.*.self_attn.q_a_proj": "replicate",
    "model.layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
}
EP = {"tp_size": 2, "ep_size": 2}
ALL = {"mtp": True, "grads": True, "balance": True}
DATA = ALL | {"drafted": False}  # ranks with batches of their own do not draft
EACH = pytest.mark.parametrize


def write_all(root: Path) -> dict[str, str]:
    """The folders that the cases load."""
    for kind in ("v3", "v3-mtp", "v2-lite", "moonlight"):
        write_release(root / kind, SHAPES[kind]())
    v3 = V3 | {"q_lora_rank": 128, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1}
    write_release(root / "fp8", DeepseekV3Config(**WIDE, **v3), fp8=True)
    ragged = WIDE | {"intermediate_size": 320, "moe_intermediate_size": 384}
    write_release(root / "fp8-v2", DeepseekV2Config(**ragged, q_lora_rank=None), fp8=True)
    write_int4(root / "int4", SHAPES["kimi"](), linears=True)
    thirds = COMMON | {
        "num_attention_heads": 6,
        "moe_intermediate_size": 48,
    }  # 64 columns of latents are 22, 22 and 20
    write_release(root / "thirds", DeepseekV3Config(**thirds, **(V3 | {"num_nextn_predict_layers": 1})))
    for kind in ("deepseek_v32", "glm_moe_dsa"):
        write_family(root / kind, kind)
    shutil.copytree(root / "v3-mtp", root / "broken")
    tensors = load_file(root / "broken" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, root / "broken" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(root / "v3-mtp", root / "other")
    fields = json.loads((root / "other" / "config.json").read_text())
    (root / "other" / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-5}))
    write_release(root / "half", SHAPES["v3-mtp"](), shards=2)
    (root / "half" / "model-00002-of-00002.safetensors").unlink()
    return {path.name: str(path) for path in root.iterdir()}


# name → release, plan, and what else a case says. All of one number of ranks run in one start of them.
SAME_2 = {
    "tp": ("v3-mtp", {"tp_size": 2}, {"observe": ALL}),
    "tp-whole-latents": ("v3-mtp", {"tp_size": 2, "tp_plan": WHOLE_LATENTS}, {"observe": {"grads": True}}),
    "tp-v2-lite": ("v2-lite", {"tp_size": 2}, {"observe": {"grads": True}}),
    "tp-moonlight": ("moonlight", {"tp_size": 2}, {"observe": {"grads": True, "mla_path": "absorbed"}}),
    "tp-sparse": ("deepseek_v32", {"tp_size": 2}, {"observe": {"grads": True}}),
    "tp-sparse-shared": ("glm_moe_dsa", {"tp_size": 2}, {"observe": {"grads": True}}),
    "all-to-all": ("v3-mtp", EP | {"ep_implementation": "all_to_all"}, {"observe": ALL}),
    "all-reduce": ("v3-mtp", EP | {"ep_implementation": "all_reduce"}, {"observe": ALL}),
    "experts-alone": ("v3-mtp", {"enable_expert_parallel": True}, {"observe": ALL}),
    "fsdp": ("v3-mtp", {"fsdp_size": 2}, {"observe": DATA | {"save": True}}),
    "fsdp-ep": ("v2-lite", {"fsdp_size": 2, "ep_size": 2}, {"observe": {"grads": True}}),
    "pp": ("v3-mtp", {"pp_size": 2}, {}),
    "tp-fp8": ("fp8", {"tp_size": 2}, {"observe": {"mtp": True, "grads": True}}),
    "tp-fp8-v2": ("fp8-v2", {"tp_size": 2}, {}),
    "tp-fp8-stacked": ("fp8", {"tp_size": 2}, {"stacked": True}),
    "tp-fp8-dequantised": ("fp8", {"tp_size": 2}, {"dequantize": True, "dtype": "float64", "observe": {"save": True}}),
    "ep-fp8": ("fp8", EP, {"observe": {"mtp": True}}),
    "ep-fp8-all-to-all": ("fp8", EP | {"ep_implementation": "all_to_all"}, {"stacked": True}),
    "fsdp-fp8": ("fp8", {"fsdp_size": 2}, {}),
    "fsdp-ep-fp8": ("fp8", {"fsdp_size": 2, "ep_size": 2}, {}),
    "pp-fp8": ("fp8", {"pp_size": 2}, {}),
    "streamed": ("fp8", {"tp_size": 2}, {"observe": {"memory": "2MB"}}),
    "tp-int4": ("int4", {"tp_size": 2}, {}),
    "tp-saved": ("v3-mtp", {"tp_size": 2}, {"dtype": "bfloat16", "observe": {"save": True, "generate": False}}),
}
DIMS_2 = {name: {"dims": name, "plan": {"tp_size": 2}} for name in DIMS}
SAME_3 = {"tp-3": ("thirds", {"tp_size": 3}, {"observe": ALL})}
SAME_4 = {
    "tp-4": ("v3-mtp", {"tp_size": 4}, {"observe": ALL}),
    "tp-fsdp": ("v3-mtp", {"tp_size": 2, "fsdp_size": 2}, {"observe": DATA}),
    "tp-fsdp-ep": ("v3-mtp", {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, {"observe": DATA}),
    "hsdp": ("v3-mtp", {"fsdp_size": 2, "dp_replicate_size": 2}, {"observe": DATA}),
    "pp-4": ("v3-mtp", {"pp_size": 4}, {}),
    "tp-pp": ("fp8", {"tp_size": 2, "pp_size": 2}, {}),
    "tp-fp8-4": ("fp8", {"tp_size": 4}, {"observe": {"mtp": True}}),
}
# name → releases of the ranks, plan, and what all of them say
REFUSED_2 = {
    "nf4": (["v3"] * 2, {"tp_size": 2}, {"nf4": True}, "self_attn.*found Linear4bit.*to-4bit"),
    "nf4-experts": (
        ["v3"] * 2,
        EP | {"tp_plan": {}},
        {"nf4": True},
        "mlp.experts: found BitsAndBytesExperts.*to-4bit",
    ),
    "nf4-fsdp": (["v3"] * 2, {"fsdp_size": 2}, {"nf4": True}, "fsdp_size: .*found .*bitsandbytes.*DDP"),
    "blocks": (
        ["small-fp8"] * 2,
        {"tp_size": 2},
        {},
        "tp_size: found 2, which does not divide .*blocks of 128; wanted 1,",
    ),
    "incomplete": (["v3-mtp", "broken"], {"tp_size": 2}, {}, "experts.3.up_proj.weight"),
    "no-shard": (["v3-mtp", "half"], {"tp_size": 2}, {}, "model-00002-of-00002.safetensors"),
    "config": (
        ["v3-mtp", "other"],
        {"tp_size": 2},
        {},
        "found rms_norm_eps=1e-05 on rank 1, wanted rms_norm_eps=1e-06",
    ),
    "version": (
        ["v3-mtp"] * 2,
        {"tp_size": 2},
        {"versions": ["1", "2"]},
        "modeling_deepseek_moe='2' on rank 1, wanted",
    ),
    "shared-choice-pp": (
        ["glm_moe_dsa"] * 2,
        {"pp_size": 2},
        {},
        "pp_size=2: found layers that attend to what an indexer",
    ),
    "ep-size-alone": (["v3-mtp"] * 2, {"ep_size": 2}, {}, "`ep_size` must divide `fsdp_size \\* tp_size`"),
    "gradients-halved": (
        ["v2-lite"] * 2,
        {"fsdp_size": 2, "ep_size": 2},
        {"dtype": "float64", "observe": {"grads": True, "generate": False}},
        "experts: found weights of torch.float64 to train, each on one of 2 ranks",
    ),
    "saving-a-part": (
        ["fp8"] * 2,
        {"enable_expert_parallel": True},
        {"observe": {"save": True}},
        "experts mapped by several",
    ),
    "saving-codes": (
        ["fp8"] * 2,
        {"tp_size": 2},
        {"stacked": True, "observe": {"save": True}},
        "codes that several ranks",
    ),
    "saving-a-stage": (["v3"] * 2, {"pp_size": 2}, {"observe": {"save": True}}, "a stage of a pipeline"),
    "drafts-auto": (["v3-mtp"] * 2, {"tp_size": 2}, {"observe": {"drafts": "auto"}}, "measure different times"),
    "drafts-pp": (["v3-mtp"] * 2, {"pp_size": 2}, {"observe": {"drafts": True}}, "in the last stage only"),
}
REFUSED_3 = {
    "heads": (["v3-mtp"] * 3, {"tp_size": 3}, {}, "num_attention_heads=4; wanted 2 or 4, the nearest that do"),
    "experts": (
        ["v3-mtp"] * 3,
        {"tp_size": 3, "ep_size": 3, "tp_plan": {}},
        {},
        "ep_size: found 3.*n_routed_experts=16; wanted 2 or 4",
    ),
    "world": (["v3-mtp"] * 3, {"tp_size": 2}, {}, "requires 2 processes, but world_size is 3"),
}


def run(root: Path, releases: dict[str, str], ranks: int, same: dict, refused: dict) -> dict[str, list[dict]]:
    cases = {name: {"release": releases[kind], "plan": plan, **more} for name, (kind, plan, more) in same.items()}
    for name, (kinds, plan, more, _) in refused.items():
        cases[name] = {"release": [releases[kind] for kind in kinds], "plan": plan, **more}
    return run_ranks(root / f"ranks-{ranks}", ranks, cases | (DIMS_2 if ranks == 2 else {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def releases(root) -> dict[str, str]:
    (root / "releases").mkdir()
    write_release(root / "releases" / "small-fp8", SHAPES["v3-mtp"](), fp8=True)
    return write_all(root / "releases")


@pytest.fixture(scope="module")
def two(root, releases):
    return run(root, releases, 2, SAME_2, REFUSED_2)


@pytest.fixture(scope="module")
def three(root, releases):
    return run(root, releases, 3, SAME_3, REFUSED_3)


@pytest.fixture(scope="module")
def four(root, releases):
    return run(root, releases, 4, SAME_4, {})


def alone(root: Path, releases, case: tuple, name: str) -> dict:
    """What one process finds."""
    kind, _, more = case
    return observe(load({"release": releases[kind], **more}, 0), root / "alone" / name, **more.get("observe", {}))


def check_same(found: list[dict], wanted: dict) -> None:
    for rank, one in enumerate(found):
        assert "error" not in one, one["error"]
        for name in wanted.keys() & {"logits", "mtp"}:
            near = 1e-5 * max(1.0, float(wanted[name].abs().max()))  # sums over ranks are rounded in another order
            torch.testing.assert_close(
                one[name], wanted[name], atol=near, rtol=0, msg=lambda said, at=(name, rank): f"{at}: {said}"
            )
        for name in wanted.keys() & {"greedy", "static", "drafted"}:
            assert torch.equal(one[name], wanted[name]), (name, rank)
        assert one.get("biases") == wanted.get("biases")
        # each rank had the same batch
        tokens = {layer: [len(found) * n for n in counts] for layer, counts in wanted.get("loads", {}).items()}
        assert one.get("loads", {}) == tokens
        assert one.get("grads", {}).keys() == wanted.get("grads", {}).keys()
        for name, gradient in wanted.get("grads", {}).items():
            torch.testing.assert_close(one["grads"][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@EACH("name", [name for name in SAME_2 if name != "tp-saved"])
def test_two_ranks_find_what_one_finds(root, releases, two, name):
    check_same(two[name], alone(root, releases, SAME_2[name], name))


@pytest.mark.long
@pytest.mark.slow
@EACH("name", SAME_4)
def test_four_ranks_find_what_one_finds(root, releases, four, name):
    check_same(four[name], alone(root, releases, SAME_4[name], name))


@pytest.mark.long
@pytest.mark.slow
@EACH("name", SAME_3)
def test_three_ranks_find_what_one_finds(root, releases, three, name):
    """Whose columns of latents do not divide evenly."""
    check_same(three[name], alone(root, releases, SAME_3[name], name))


@pytest.mark.slow
@EACH("name", ["fsdp", "tp-fp8-dequantised", "tp-saved"])
def test_saved_bytes(root, releases, two, name):
    alone(root, releases, SAME_2[name], name)
    check_saved(root / "ranks-2" / name, root / "alone" / name)
    AutoModelForCausalLM.from_pretrained(root / "ranks-2" / name)


def check_saved(found: Path, wanted: Path) -> None:
    """The same bytes, tensor by tensor."""
    theirs, ours = (
        {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for folder in (found, wanted)
    )
    assert ours and ours.keys() == theirs.keys()
    assert all(theirs[key].dtype == tensor.dtype for key, tensor in ours.items())
    assert all(torch.equal(theirs[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in ours.items())


@pytest.mark.slow
def test_attention_halves(two, root, releases):
    model = load({"release": releases["fp8"]}, 0)
    whole = sum(p.nbytes for name, p in model.named_parameters() if ".self_attn." in name)
    norms = sum(p.nbytes for name, p in model.named_parameters() if ".self_attn." in name and "norm" in name)
    for rank in two["tp-fp8"]:
        assert rank["attention"] - norms == (whole - norms) // 2
    assert two["tp-whole-latents"][0]["attention"] > two["tp"][0]["attention"]
    for rank in two["experts-alone"]:
        assert rank["attention"] == two["tp"][0]["attention"] + two["tp"][0]["divided"]


@pytest.mark.slow
@EACH("name", DIMS_2)
def test_attention_halves_at_the_dimensions_of_releases(two, name):
    """But for the norms of its latents."""
    for rank in two[name]:
        assert rank["attention"] / attention_of(name) == pytest.approx(0.5, abs=1e-4)
    page = (Path(__file__).resolve().parents[1] / "docs" / "distributed-inference.md").read_text()
    for nbytes in (attention_of(name), two[name][0]["attention"]):
        assert f"{nbytes / 1e6:.1f} MB" in page


@pytest.mark.slow
@EACH("name", ["tp-fp8", "ep-fp8", "fsdp-ep-fp8", "streamed"])
def test_each_rank_maps_its_own_experts(two, name):
    # one layer of the decoder, and the MTP layer
    assert [rank["mapped"] for rank in two[name]] == [[(0, 4)] * 2, [(4, 4)] * 2]
    assert all(rank["engine"] for rank in two[name])


@pytest.mark.slow
@EACH("name", REFUSED_2)
def test_all_of_two_ranks_say_why(two, name):
    check_refused(two[name], REFUSED_2[name][3])


@pytest.mark.long
@pytest.mark.slow
@EACH("name", REFUSED_3)
def test_all_of_three_ranks_say_why(three, name):
    check_refused(three[name], REFUSED_3[name][3])


def check_refused(found: list[dict], said: str) -> None:
    for rank in found:
        with pytest.raises(RuntimeError, match=said):
            raise RuntimeError(rank.get("error", "no error"))
        assert rank["seconds"] < 60  # no one waited for a time-out


@pytest.mark.slow
def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        (tmp_path / "run.py").write_text("")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        command += [f"--master-port={taken.getsockname()[1]}", "run.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode and "EADDRINUSE" in done.stderr


def test_nearest_sizes():
    wholes = [Whole("num_attention_heads", 16), Whole("o_proj: in_features", 2048, 128), Whole("experts", 64)]
    check("tp_size", 8, wholes)
    with pytest.raises(
        ValueError, match=r"tp_size: found 6, which does not divide num_attention_heads=16, .*wanted 4 or 8"
    ):
        check("tp_size", 6, wholes)
    with pytest.raises(ValueError, match="in blocks of 128; wanted 1, the nearest that does"):
        check("tp_size", 2, [Whole("o_proj: in_features", 192, 128)])


@EACH("ranks", [1, 2, 3, 4])
def test_columns_of_latents_are_divided_as_torch_divides_them(ranks):
    """Of 5 columns four ranks have 2, 2, 1 and none."""
    x = torch.randn(3, 5)
    meshes = [
        SimpleNamespace(ndim=1, size=lambda: ranks, get_local_rank=lambda rank=rank: rank) for rank in range(ranks)
    ]
    with torch.no_grad():
        parts = [LatentParallel().transform_inputs_pre_forward(None, (x,), {}, mesh)[0][0] for mesh in meshes]
    chunks = x.chunk(ranks, dim=-1)
    assert [part.shape[-1] for part in parts] == [c.shape[-1] for c in chunks] + [0] * (ranks - len(chunks))
    assert torch.equal(torch.cat(parts, dim=-1), x)


@EACH("kind", SHAPES)
def test_each_rule_of_a_plan_names_something(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[kind]())
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()
    }
    names |= {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_parameters()
    }
    for plan in (model.tp_plan, model.ep_plan, model.fsdp_plan):
        assert plan and plan.keys() <= names
    divided = {name.rpartition(".")[2] for name, style in model.tp_plan.items() if ".self_attn." in name}
    query = "q_proj" if model.config.q_lora_rank is None else "q_b_proj"
    latents = {"kv_a_proj_with_mqa"} | ({"q_a_proj"} if model.config.q_lora_rank else set())
    assert divided == {query, "kv_b_proj", "o_proj"} | latents
    assert ("model.layers.*.eh_proj" in model.tp_plan) == bool(model.config.num_nextn_predict_layers)
