"""``convert merge-adapter`` next to peft's own merge on plain transformers' classes, and to W + s·B·A in fp64."""

import json
from functools import partial

import pytest
import torch
from adapters import EXPERTS, MLP, adapted, expert_adapter, load, logits, plain
from releases import SHAPES, same_bits, write_release
from safetensors.torch import load_file, save_file
from test_conversion_roundtrip import ok, read

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.tools

KINDS = {
    "patterns": {
        "target_modules": ["q_a_proj", "o_proj", "kv_b_proj"],
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_a_proj": 5},
    },
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True, "rank_pattern": {r"1\.self_attn\.o_proj": 5}},
    "dora": {"target_modules": ["o_proj", "q_b_proj"], "use_dora": True},
    "dora rslora": {"target_modules": ["o_proj"], "use_dora": True, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "mlp": {"target_modules": MLP},
    "experts": {
        "target_modules": ["o_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"experts.gate_up_proj": 4},
        "alpha_pattern": {r"2\.mlp\.experts\.down_proj": 7},
        "use_rslora": True,
    },
    "down alone": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["gate.weight"], "rank_pattern": {"gate.weight": 3}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": [5, 0, 127]}},
    "whole modules": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "whole experts": {"target_modules": ["o_proj"], "modules_to_save": ["experts", "gate", "shared_experts"]},
    "biases": {"target_modules": ["kv_a_proj_with_mqa", "o_proj"], "lora_bias": True},
    "all biases": {"target_modules": ["kv_a_proj_with_mqa", "q_a_proj"], "bias": "all"},
    "pissa": {"target_modules": ["o_proj", "q_b_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["o_proj"], "init_lora_weights": "olora", "lora_alpha": 4},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Releases in fp32, one with biases in its attention."""
    parent = tmp_path_factory.mktemp("merge")
    write_release(parent / "plain", SHAPES["v3"](), dtype=torch.float32)
    config = SHAPES["v3"]()
    config.attention_bias = True
    write_release(parent / "biased", config, dtype=torch.float32)
    return parent


def trained(model):
    """Adapters and whole modules as after some steps."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


@pytest.mark.parametrize("name", KINDS)
def test_merged_is_pefts_own_merge(name, bases, tmp_path):
    base = bases / ("biased" if "bias" in name else "plain")
    # the whole embedding and head too, as peft does by itself once a vocabulary was resized
    embeddings = True if name in ("tokens", "embeddings") else "auto"
    trained(adapted(plain(base), **KINDS[name])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=embeddings
    )
    model = peft.PeftModel.from_pretrained(plain(base), tmp_path / "adapter").eval()
    wanted = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    printed = ok("merge-adapter", base, tmp_path / "ours", "--adapter", tmp_path / "adapter")
    before, theirs, ours = (read(folder) for folder in (base, tmp_path / "theirs", tmp_path / "ours"))
    assert ours.keys() == before.keys() == theirs.keys()
    changed = [tensor for tensor in ours if not same_bits(ours[tensor], before[tensor])]
    assert changed and f"as they were: tensors {len(before) - len(changed)}" in printed
    tolerance = 2e-5 if name in ("pissa", "olora") else 1e-6  # theirs rounds twice on the way
    for tensor, values in ours.items():
        if tensor in changed:
            torch.testing.assert_close(values, theirs[tensor], rtol=tolerance, atol=tolerance, msg=tensor)
        else:
            assert torch.equal(values, theirs[tensor]), tensor
    for door in (plain, load):
        torch.testing.assert_close(logits(door(tmp_path / "ours")), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(plain(base)), wanted, atol=1e-2)


def test_pissa_converted_to_lora(bases, tmp_path):
    """The residual is no longer needed: peft saves twice the rank, for the weights as they were."""
    base = bases / "plain"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(plain(base), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    trained(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ok("merge-adapter", base, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), wanted, rtol=1e-3, atol=1e-3)


def low_rank(adapter, weight, scaling=4.0):
    key = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
    return scaling * adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double()


def is_nearest(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Whether no neighbour of a bf16 or fp16 value is nearer to an fp64 one."""
    gap = (found.double() - wanted).abs()
    bits = found.view(torch.int16)
    neighbours = [(bits + step).view(found.dtype).double() for step in (1, -1)]
    return torch.stack([gap <= (other - wanted).abs() for other in neighbours]).all(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_rounded_once(dtype, tmp_path):
    before = write_release(tmp_path / "base", SHAPES["v3"](), dtype=dtype)
    adapted(plain(tmp_path / "base"), target_modules=["o_proj", "q_a_proj"]).save_pretrained(tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ok("merge-adapter", tmp_path / "base", tmp_path / "merged", "--adapter", tmp_path / "adapter")
    found = read(tmp_path / "merged")
    names = [name for name in before if name.endswith(("o_proj.weight", "q_a_proj.weight"))]
    assert len(names) == 6
    for name in names:
        wanted = before[name].double() + low_rank(adapter, name)
        assert found[name].dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-7, atol=1e-9)
        else:
            assert is_nearest(found[name], wanted).all(), name


def test_values_near_a_boundary_are_rounded_once():
    """On the way through fp32 they would land on the boundary, and go to the even side of it."""
    from modeling_deepseek_moe.conversion._changes import round_once

    half = 2.0**-8  # half a step of bf16 at 1
    values = torch.tensor(
        [1 + half + 2**-40, 1 + half - 2**-40, 1 + half, 1 + 3 * half - 2**-40, 2.0**-140], dtype=torch.float64
    )
    values = torch.cat((values, -values))
    wanted = torch.tensor([1 + 2 * half, 1, 1, 1 + 2 * half, 0])
    assert torch.equal(round_once(values, torch.bfloat16).float(), torch.cat((wanted, -wanted)).bfloat16().float())
    many = torch.randn(1 << 16, dtype=torch.float64) * 0.1
    for dtype in (torch.bfloat16, torch.float16):
        assert is_nearest(round_once(many, dtype), many).all()


def test_one_entry_per_expert_and_only_for_some(bases, tmp_path):
    base, dense = bases / "plain", load(bases / "plain")
    expert_adapter(tmp_path / "adapter", dense, MLP)
    ok("merge-adapter", base, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), logits(dense), rtol=1e-3, atol=1e-3)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    some = {key: tensor for key, tensor in load_file(file).items() if ".1.mlp.experts.3.up_proj" in key}
    save_file(some, file)
    ok("merge-adapter", base, tmp_path / "some", "--adapter", tmp_path / "adapter")
    before, found = read(base), read(tmp_path / "some")
    changed = [name for name in before if not same_bits(before[name], found[name])]
    assert changed == ["model.layers.1.mlp.experts.3.up_proj.weight"]
    wanted = before[changed[0]].double() + low_rank(some, changed[0], 2.0)
    torch.testing.assert_close(found[changed[0]].double(), wanted, rtol=1e-7, atol=1e-9)


def test_several_adapters_in_order_and_by_weight(bases, tmp_path):
    base = bases / "plain"
    kind = {"target_modules": ["o_proj", "q_b_proj"]}
    adapted(plain(base), **kind).save_pretrained(tmp_path / "one")
    trained(adapted(plain(base), lora_alpha=3, **kind)).save_pretrained(tmp_path / "two")
    model = peft.PeftModel.from_pretrained(plain(base), tmp_path / "one").eval()
    model.load_adapter(tmp_path / "two", adapter_name="two")
    both = ("--adapter", tmp_path / "one", "--adapter", tmp_path / "two")
    for weights in ((1.0, 1.0), (0.5, -2.0)):
        label = f"sum{weights[0]}".replace(".", "_")
        model.add_weighted_adapter(["default", "two"], list(weights), label, combination_type="cat")
        model.set_adapter(label)
        given = () if weights == (1.0, 1.0) else (f"--weight={weights[0]}", f"--weight={weights[1]}")
        ok("merge-adapter", base, tmp_path / label, *both, *given)
        # peft takes the root of a weight times a scale, and the sign of neither
        wanted = read(base) if weights[1] < 0 else None
        if wanted is None:
            torch.testing.assert_close(logits(plain(tmp_path / label)), logits(model), rtol=1e-3, atol=1e-3)
            continue
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
        found = read(tmp_path / label)
        for name in [name for name in wanted if name.endswith(("o_proj.weight", "q_b_proj.weight"))]:
            sums = wanted[name].double() + weights[0] * low_rank(one, name) + weights[1] * low_rank(two, name, 1.5)
            torch.testing.assert_close(found[name].double(), sums, rtol=1e-6, atol=1e-7)


def test_a_weighted_dora_goes_part_of_the_way(bases, tmp_path):
    base = bases / "plain"
    trained(adapted(plain(base), target_modules=["o_proj"], use_dora=True)).save_pretrained(tmp_path / "adapter")
    merge = partial(ok, "merge-adapter", base)
    merge(tmp_path / "whole", "--adapter", tmp_path / "adapter")
    merge(tmp_path / "half", "--adapter", tmp_path / "adapter", "--weight", 0.5)
    before, whole, half = (read(folder) for folder in (base, tmp_path / "whole", tmp_path / "half"))
    for name, values in half.items():
        torch.testing.assert_close(values, (before[name] + whole[name]) / 2, rtol=1e-6, atol=1e-7)


def test_an_adapter_of_a_headless_model(bases, tmp_path):
    from transformers import AutoModel

    model = adapted(AutoModel.from_pretrained(bases / "plain", dtype=torch.float32), target_modules=["o_proj"])
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.layers.") for key in keys)
    ok("merge-adapter", bases / "plain", tmp_path / "merged", "--adapter", tmp_path / "adapter")
    name = "model.layers.2.self_attn.o_proj.weight"
    wanted = read(bases / "plain")[name].double() + low_rank(keys, name.removeprefix("model."))
    torch.testing.assert_close(read(tmp_path / "merged")[name].double(), wanted, rtol=1e-7, atol=1e-9)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (bases / "plain" / "config.json").read_text()
    )
