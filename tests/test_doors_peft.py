"""peft on these models, next to plain transformers' classes on the same weights: targets, save, load, merge, resume."""

from contextlib import nullcontext

import pytest
import torch
from adapters import ATTENTION, EXPERTS, IDS, MLP, adapted, doors, expert_adapter, load, logits, plain, train
from families import FIELDS
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.distributed import DistributedConfig

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.training.attach import attach_state

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.tools

KINDS = {
    "attention": {"target_modules": ATTENTION},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "mlp": {"target_modules": MLP},
    "all-linear": {"target_modules": "all-linear"},
    "experts": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    "router": {"target_modules": ["o_proj"], "target_parameters": ["gate.weight"]},
    "modules_to_save": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
CASES = [("v3", kind) for kind in KINDS] + [
    (shape, kind) for shape in ("v2", "v3-mtp") for kind in ("mlp", "all-linear")
]


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    parent = tmp_path_factory.mktemp("peft")
    for shape in ("v3", "v2", "v3-mtp", "kimi"):
        write_release(parent / shape, SHAPES[shape]())
    return parent


@pytest.fixture(scope="module")
def release(releases):
    return releases / "v3"


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_lora_is_plain_transformers_and_survives_saving_and_merging(shape, kind, releases, tmp_path):
    release, kind = releases / shape, KINDS[kind]
    ours = adapted(load(release), task_type="CAUSAL_LM", **kind)
    theirs = adapted(plain(release), **kind)
    assert set(ours.state_dict()) >= {name for name in theirs.state_dict() if "lora_" in name}
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    want = logits(ours)
    torch.testing.assert_close(want, logits(theirs), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(want, logits(load(release)), atol=1e-2) or "modules_to_save" in kind
    ours.save_pretrained(tmp_path)
    loaded = doors(release, tmp_path)
    for model in loaded.values():
        assert torch.equal(logits(model.eval()), want)
    torch.testing.assert_close(logits(loaded["PeftModel"].merge_and_unload()), want, rtol=1e-3, atol=1e-3)
    source = tmp_path / "source"
    load(release).save_pretrained(source)  # in fp32, as the adapter's model was
    app(
        ["convert", "merge-adapter", str(source), str(tmp_path / "out"), "--adapter", str(tmp_path)],
        standalone_mode=False,
    )
    torch.testing.assert_close(logits(load(tmp_path / "out")), want, rtol=1e-3, atol=1e-3)


def test_a_bf16_model_is_plains_and_comes_back_bit_for_bit(release, tmp_path):
    ours = adapted(load(release, dtype=torch.bfloat16), **KINDS["mlp"])
    theirs = adapted(plain(release, dtype=torch.bfloat16), **KINDS["mlp"])
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    want = logits(ours)
    assert (want - logits(theirs)).abs().mean() < 0.05 * want.abs().mean()
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(load(release, dtype=torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(back), want)
    for model in (again := load(release, dtype=torch.bfloat16), theirs := plain(release, dtype=torch.bfloat16)):
        model.load_adapter(tmp_path)  # which, of transformers, keeps them in the model's dtype
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert (logits(again) - logits(theirs)).abs().mean() < 0.05 * want.abs().mean()


@pytest.mark.parametrize("kind", ["mlp", "experts", "all-linear"])
def test_trainer_resumes_as_if_never_interrupted(kind, release, tmp_path):
    def trained(resume):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(release), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **KINDS[kind]))
        return train(model, tmp_path, resume, gradient_checkpointing=True)

    straight = trained(None)
    assert straight[-1] != straight[0]
    assert trained(str(tmp_path / "checkpoint-2")) == straight


@pytest.mark.parametrize("shape", ["v3", "v2", "v3-mtp"])
@pytest.mark.parametrize("projections", [MLP, ["o_proj", "down_proj"]], ids=["mlp", "down_proj"])
def test_adapters_with_an_entry_per_expert_are_their_dense_difference(projections, shape, releases, tmp_path):
    release = releases / shape
    dense = load(release)
    expert_adapter(
        tmp_path, dense, projections, base_model_name_or_path=str(release), task_type="CAUSAL_LM",
        rank_pattern={"shared_experts.down_proj": 2}, alpha_pattern={"shared_experts.down_proj": 4},
    )  # fmt: skip
    loaded = doors(release, tmp_path)
    for model in loaded.values():
        torch.testing.assert_close(logits(model.eval()), logits(dense), rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(model), logits(loaded["PeftModel"]))
    loaded["PeftModel"].save_pretrained(tmp_path / "again")
    for again in doors(release, tmp_path / "again").values():
        assert torch.equal(logits(again.eval()), logits(loaded["PeftModel"]))


def without(folder, *, rename):
    """The adapter's tensors under other names; those that get none are left out."""
    file = folder / "adapter_model.safetensors"
    renamed = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in renamed.items() if name}, file)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: None if ".mlp.experts.3." in name else name, "down_proj: found an adapter of 15 experts, wanted 16"),
        (lambda name: name.replace("o_proj", "out_proj"), "6 tensors .* no place in the model.*layers.0.self_attn.out_proj"),
    ],
)  # fmt: skip
def test_load_adapter_refuses_by_name_what_it_cannot_use(rename, message, release, tmp_path):
    expert_adapter(tmp_path / "adapter", load(release), MLP)
    without(tmp_path / "adapter", rename=rename)
    model = load(release)
    before, trained = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
    assert [name for name, _ in model.named_modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    adapted(load(release), **KINDS["attention"]).save_pretrained(tmp_path / "first")
    model.load_adapter(tmp_path / "first", adapter_name="first")
    first = logits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "adapter", adapter_name="second")
    assert torch.equal(logits(model), first) and not torch.equal(first, before)
    assert list(model.peft_config) == ["first"]


def test_load_adapter_with_and_without_a_head(release, tmp_path):
    dense = load(release)
    expert_adapter(tmp_path / "head", dense, MLP)
    model = AutoModel.from_pretrained(release, dtype=torch.float32).eval()
    model.load_adapter(tmp_path / "head")
    with torch.no_grad():
        want = dense.model(IDS).last_hidden_state
        torch.testing.assert_close(model(IDS).last_hidden_state, want, rtol=1e-3, atol=1e-3)
    expert_adapter(tmp_path / "headless", AutoModel.from_pretrained(release, dtype=torch.float32), MLP)
    model = load(release)
    model.load_adapter(tmp_path / "headless")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


def test_load_adapter_refuses_layers_on_disk(release, tmp_path):
    expert_adapter(tmp_path / "adapter", load(release), MLP)
    parts = ("embed_tokens", "layers.1", "layers.2", "norm", "rotary_emb")
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.layers.0": "disk"}
    model = load(release, device_map=device_map, offload_folder=tmp_path / "disk")
    before = logits(model)
    with pytest.raises(ValueError, match=r"layers\.0\..*offloaded to disk.*device_map.*merge-adapter"):
        model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: None if ".mlp.experts.3." in name else name,
            r"found \[\d+, \d+\], wanted \[\d+, \d+\] for all experts.*merge-adapter",
        ),
        (lambda name: name.replace("o_proj", "out_proj"), "6 tensors .* no place in the model.*layers.0.self_attn.out_proj"),
    ],
)  # fmt: skip
def test_peft_is_told_by_name_what_cannot_be_used(rename, message, release, tmp_path):
    expert_adapter(tmp_path, load(release), MLP)
    without(tmp_path, rename=rename)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(load(release), tmp_path)


FOREIGN = {
    "hidden_size": ({"target_modules": ATTENTION}, r"self_attn\.o_proj\.lora_B\.\w+\.weight: found \[128, 2\], wanted \[64, 2\]"),
    "n_routed_experts": (KINDS["experts"], r"mlp\.experts\.\S+: found \[64, 64\], wanted \[32, 64\] for all experts"),
}  # fmt: skip


@pytest.mark.parametrize("field", FOREIGN)
def test_adapters_of_other_shapes_leave_the_model_as_it_was(field, release, tmp_path):
    config = SHAPES["v3"]()
    setattr(config, field, 2 * getattr(config, field))
    write_release(tmp_path / "other", config)
    kind, said = FOREIGN[field]
    adapted(load(tmp_path / "other"), **kind).save_pretrained(tmp_path / "adapter")
    model = load(release)
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    for source, door in (
        (r"adapter/adapter_model\.safetensors: tensor ", model.load_adapter),
        ("adapter default: tensor ", lambda folder: peft.PeftModel.from_pretrained(model, folder)),
    ):
        with pytest.raises(ValueError, match=source + r"\S*" + said):
            door(tmp_path / "adapter")
        assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
        assert [name for name, _ in model.named_modules()] == modules
        assert [parameter.requires_grad for parameter in model.parameters()] == trained
    wrapped = adapted(model, **KINDS["attention"])
    first = logits(wrapped)
    with pytest.raises(ValueError, match="adapter second: tensor"):
        wrapped.load_adapter(tmp_path / "adapter", "second")
    torch.testing.assert_close(logits(wrapped), first, rtol=0, atol=1e-6)
    assert list(wrapped.peft_config) == ["default"]
    # an adapter that was there stays
    with pytest.raises(ValueError, match=r"adapter default: tensor|no place in the model"):
        peft.set_peft_model_state_dict(wrapped, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert list(wrapped.peft_config) == ["default"]
    torch.testing.assert_close(logits(wrapped), first, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "targets", [["up_proj"], ["shared_experts.gate_proj", "up_proj"], ["layers.9.mlp.shared_experts.up_proj"]]
)
def test_gate_and_up_of_routed_experts_go_together(targets, release):
    model = load(release)
    before = logits(model)
    with pytest.raises(ValueError, match=r"target_modules: found \S*up_proj, .* without gate_proj, wanted both"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


def test_what_is_for_layers_left_out_is_said(releases, tmp_path, caplog):
    adapted(load(releases / "v3-mtp"), **KINDS["mlp"]).save_pretrained(tmp_path)
    model = load(releases / "v3-mtp", num_nextn_predict_layers=0)
    model.load_adapter(tmp_path)
    assert "has 3 layers: left out" in caplog.text
    want = logits(peft.PeftModel.from_pretrained(load(releases / "v3-mtp"), tmp_path))
    assert torch.equal(logits(model), want)
    caplog.clear()
    model = peft.PeftModel.from_pretrained(load(releases / "v3-mtp", num_nextn_predict_layers=0), tmp_path)
    assert "has 3 layers: left out" in caplog.text
    assert torch.equal(logits(model), want)


def test_several_adapters_and_ia3(release):
    model = load(release)
    base = logits(model)
    one = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=ATTENTION)
    wrapped = peft.get_peft_model(model, one).eval()
    first = logits(wrapped)
    wrapped.add_adapter("two", one)
    wrapped.set_adapter("two")
    assert not torch.allclose(logits(wrapped), first, atol=1e-3)
    wrapped.add_weighted_adapter(["default", "two"], [1.0, 0.0], "sum", combination_type="cat")
    wrapped.set_adapter("sum")
    torch.testing.assert_close(logits(wrapped), first, rtol=1e-3, atol=1e-3)
    wrapped.delete_adapter("two")
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), base)
    assert torch.equal(logits(wrapped.unload()), base)
    ia3 = peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[], init_ia3_weights=False)
    scaled = peft.get_peft_model(load(release), ia3).eval()
    assert not torch.allclose(logits(scaled), base, atol=1e-3)
    for call in (scaled, scaled.generate):
        with pytest.raises(ValueError, match="adapter_names: found adapters of peft_type=IA3"):
            call(input_ids=IDS, adapter_names=["__base__"])


@torch.no_grad()
def test_generation_with_an_adapter_for_each_row(release):
    """Cached latents meet the adapters of their own rows where decoding reads ``kv_b_proj``."""
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["kv_b_proj", "o_proj"])
    model = peft.get_peft_model(load(release), config).eval()
    model.add_adapter("second", config)
    rows, names = IDS.repeat(3, 1), ["second", "__base__", "default"]
    found = model(rows, adapter_names=names, mla_path="absorbed").logits
    text = model.generate(input_ids=rows, adapter_names=names, max_new_tokens=6, do_sample=False)
    assert len({tuple(row.tolist()) for row in text}) == 3
    for name, logit, line in zip(names, found, text, strict=True):
        with model.disable_adapter() if name == "__base__" else nullcontext(model.set_adapter(name)):
            torch.testing.assert_close(logit, model(IDS, mla_path="absorbed").logits[0], rtol=1e-3, atol=1e-3)
            assert torch.equal(line, model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)[0])


@torch.no_grad()
def test_sparse_attention_refuses_an_adapter_for_each_row():
    """It reads the weight of ``kv_b_proj``, of which there is none then."""
    base = dsm.DeepseekV32ForCausalLM(dsm.DeepseekV32Config(**FIELDS["deepseek_v32"])).eval()
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["kv_b_proj"])
    model = peft.get_peft_model(base, config).eval()
    few, many = (IDS[:, : base.config.index_topk + more].repeat(2, 1) for more in (-1, 1))
    assert model(few, adapter_names=["default", "__base__"]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"adapter_names: found several .*sparse attention"):
        model(many, adapter_names=["default", "__base__"])


HEADS = ["kv_b_proj", "o_proj", "q_b_proj"]
DIVIDED = {
    "all-linear": ({"target_modules": "all-linear", "exclude_modules": ["experts", "q_a_proj", "kv_a_proj_with_mqa"]}, HEADS),
    "without stacks": (
        {"target_modules": "all-linear", "exclude_modules": ["gate_up_proj", "experts.down_proj", "q_a_proj", "kv_a_proj_with_mqa"]},
        HEADS,
    ),
    "a stack": ({**KINDS["experts"], "target_parameters": EXPERTS[1:], "exclude_modules": ["down_proj"]}, ["o_proj"]),
    "a layer": (
        {"target_modules": ["o_proj"], "target_parameters": [f"layers.1.{EXPERTS[0]}"], "exclude_modules": r".*\.1\.mlp\.experts"},
        ["o_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", ["v3", "kimi"])
@pytest.mark.parametrize(("kind", "wanted"), DIVIDED.values(), ids=DIVIDED)
def test_what_is_excluded_is_no_reason_to_refuse_a_divided_model(kind, wanted, shape, releases):
    model = load(releases / shape)
    model.config.distributed_config, model._is_distributed_loading_by_transformers = DistributedConfig(tp_size=2), True
    named = {name.split(".lora_A")[0] for name, _ in adapted(model, **kind).named_parameters() if ".lora_A" in name}
    assert sorted({name.rpartition(".")[2] for name in named if not name.endswith("mlp.gate")}) == wanted


@pytest.mark.parametrize("shape", ["v3", "kimi"])
def test_all_linear_is_no_head(shape, releases):
    classifier = AutoModelForSequenceClassification.from_pretrained(releases / shape, num_labels=2)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"), classifier)
    assert type(classifier.score) is torch.nn.Linear
    model = adapted(load(releases / shape), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear"))
    assert list(model.base_model.model.lm_head.lora_A) == ["default"]


def test_balancing_with_an_adapted_router(release):
    model = adapted(load(release), **KINDS["router"]).train()
    state = attach_state(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(load.shape == (16,) for load in state.loads.values())
