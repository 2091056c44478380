"""peft on these models, beside plain transformers' classes on the same weights: targets, save, load, merge, refusals."""

import json

import pytest
import torch
import transformers
from releases import SHAPES, write_release
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Trainer, TrainingArguments

from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.training.attach import attach_state

peft = pytest.importorskip("peft")
IDS = torch.arange(10, 26)[None]
ATTENTION = ["q_b_proj", "o_proj"]
MLP = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
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


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "bf16"
    write_release(folder, SHAPES["v3"]())
    return folder


@pytest.fixture(scope="module")
def fp8_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "fp8"
    write_release(folder, SHAPES["v3"](), fp8=True)
    return folder


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | kwargs)).eval()


def plain(folder):
    config = transformers.DeepseekV3Config.from_pretrained(folder)
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def adapted(model, **kind):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "init_lora_weights": False} | kind)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_lora_is_plain_transformers_and_survives_saving_and_merging(kind, release, tmp_path):
    ours, theirs = adapted(load(release), **kind), adapted(plain(release), **kind)
    assert set(ours.state_dict()) >= {name for name in theirs.state_dict() if "lora_" in name}
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    want = logits(ours)
    torch.testing.assert_close(want, logits(theirs), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(want, logits(load(release)), atol=1e-2) or "modules_to_save" in kind
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(release), tmp_path).eval()
    assert torch.equal(logits(loaded), want)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), want, rtol=1e-3, atol=1e-3)
    if not kind.get("use_dora"):  # which merge-adapter refuses by name
        source = tmp_path / "source"
        load(release).save_pretrained(source)  # in fp32, as the adapter's model was
        app(
            ["convert", "merge-adapter", str(source), str(tmp_path / "out"), "--adapter", str(tmp_path)],
            standalone_mode=False,
        )
        torch.testing.assert_close(logits(load(tmp_path / "out")), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "experts", "all-linear"])
def test_trainer_resumes_as_if_never_interrupted(kind, release, tmp_path):
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(4, 12)]

    def train(resume):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(release), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **KINDS[kind]))
        arguments = TrainingArguments(
            tmp_path, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    straight = train(None)
    assert straight[-1] != straight[0]
    assert train(str(tmp_path / "checkpoint-2")) == straight


def expert_adapter(folder, model, projections):
    """An adapter with one entry per projection of every MLP and expert; ``model`` gets the difference added."""
    generator, tensors, parameters = torch.Generator().manual_seed(0), {}, dict(model.named_parameters())
    for name, weight in parameters.items():
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        if ".mlp.experts." in name:
            parts = [
                (f"{stem}.{i}.{projection}", rows)
                for i, expert in enumerate(weight.data)
                for projection, rows in zip(
                    ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",),
                    expert.chunk(2) if leaf == "gate_up_proj" else (expert,),
                    strict=True,
                )
            ]
        else:
            parts = [(f"{stem}.{leaf}", weight.data)]
        for key, rows in parts:
            if key.rpartition(".")[2] in projections:
                a = torch.randn(2, rows.shape[1], generator=generator) * 0.1
                b = torch.randn(rows.shape[0], 2, generator=generator) * 0.1
                rows += 2 * b @ a
                tensors |= {f"base_model.model.{key}.lora_{half}.weight": m for half, m in (("A", a), ("B", b))}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": projections, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("projections", [MLP, ["o_proj", "down_proj"]], ids=["mlp", "down_proj"])
def test_adapters_with_an_entry_per_expert_are_their_dense_difference(projections, release, tmp_path):
    dense = load(release)
    expert_adapter(tmp_path, dense, projections)
    loaded = peft.PeftModel.from_pretrained(load(release), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-3, atol=1e-3)
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(load(release), tmp_path / "again")
    assert torch.equal(logits(again.eval()), logits(loaded))


@pytest.mark.parametrize("kind", ["mlp", "all-linear", "experts"])
def test_what_fp8_cannot_take_is_refused_by_name_and_leaves_the_model_as_it_was(kind, fp8_release):
    model = load(fp8_release)
    before = logits(model)
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*found FP8.*dequantize=True"):
        adapted(model, **KINDS[kind])
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "peft_config")


def test_expert_adapter_on_fp8_is_refused_not_dropped(fp8_release, tmp_path):
    expert_adapter(tmp_path, load(fp8_release, quantization_config=FineGrainedFP8Config(dequantize=True)), MLP)
    with pytest.raises(ValueError, match="experts: found FP8-resident"):
        peft.PeftModel.from_pretrained(load(fp8_release), tmp_path)


def test_lora_on_fp8_attention(fp8_release, tmp_path):
    model = adapted(load(fp8_release), target_modules=ATTENTION)
    want = logits(model)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(fp8_release), tmp_path).eval()), want)
    with pytest.raises(ValueError, match=r"o_proj|q_b_proj.*found FP8 codes.*merge-adapter"):
        model.merge_and_unload()
    injected = load(fp8_release, dtype=torch.bfloat16)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=ATTENTION), injected)  # as add_adapter does
    assert all(p.dtype == torch.float32 for name, p in injected.named_parameters() if "lora_" in name)


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
    assert not torch.allclose(logits(peft.get_peft_model(load(release), ia3).eval()), base, atol=1e-3)


def test_balancing_with_an_adapted_router(release):
    model = adapted(load(release), **KINDS["router"]).train()
    state = attach_state(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(load.shape == (16,) for load in state.loads.values())
