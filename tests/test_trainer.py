"""Fine-tuning with the plain `Trainer`: precisions, gradient checkpointing, save, resume, best model, adapters."""

import pytest
import torch
import training_harness
from releases import SHAPES, write_release
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    FineGrainedFP8Config,
    Trainer,
    set_seed,
)


class Counting(Dataset):
    """Rows that count up from random starts: learnable, and the same every time."""

    def __init__(self, rows=32, length=16):
        self.rows = [(torch.arange(length) + 5 * row) % 120 + 3 for row in range(rows)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def arguments(folder, **settings):
    return training_harness.arguments(folder, **({"max_steps": 8, "per_device_train_batch_size": 4} | settings))


def load(folder, dtype=torch.float32, fp8=False, kind="v3-mtp", **settings):
    write_release(folder / "release", SHAPES[kind](), fp8=fp8)
    if fp8:
        settings["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder / "release", dtype=dtype, **settings)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8-dequantized"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
def test_full_fine_tuning(tmp_path, precision, fp8):
    model = load(tmp_path, torch.bfloat16 if precision == "bf16" else torch.float32, fp8)
    settings = arguments(tmp_path, bf16=precision == "bf16-autocast", max_steps=40, learning_rate=1e-2)
    trainer = Trainer(model, settings, train_dataset=Counting())
    trainer.train()
    history = losses(trainer)
    assert sum(history[-2:]) < 0.7 * sum(history[:2])
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_autocast_keeps_the_router_in_fp32_and_takes_experts_to_bf16(tmp_path):
    model = load(tmp_path)
    moe = model.model.layers[1].mlp
    x = torch.randn(40, model.config.hidden_size)
    wanted = moe.gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moe.gate(x)
        out = moe.experts(x, found[2], found[1])
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert out.dtype == torch.bfloat16
    reference = moe.experts(x, wanted[2], wanted[1])
    assert 0 < (out - reference).abs().max() < 0.05 * reference.abs().max()


def test_packed_rows_train_like_separate_ones(tmp_path):
    model = load(tmp_path)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in (Counting()[0], Counting()[1])]
    packed = DataCollatorWithFlattening(return_tensors="pt")(rows)
    # the loss of each row's own tokens, by two passes
    separate = [model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["input_ids"]])).loss for row in rows]
    packed = {name: value for name, value in packed.items() if name in ("input_ids", "position_ids", "labels")}
    torch.testing.assert_close(model(**packed).loss, sum(separate) / 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    model = load(tmp_path).train()
    ids = Counting()[3]["input_ids"][None]
    model(ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


@pytest.mark.parametrize("shard", ["5GB", "100KB"], ids=["one-shard", "shards"])
@pytest.mark.slow
def test_resume_continues_as_if_uninterrupted(tmp_path, shard, monkeypatch):
    def run(folder, resume=None, steps=8):
        set_seed(0)
        model = load(tmp_path)
        save = model.save_pretrained
        model.save_pretrained = lambda *args, **kwargs: save(*args, **kwargs, max_shard_size=shard)
        trainer = Trainer(
            model, arguments(folder, max_steps=steps, save_strategy="steps", save_steps=4), train_dataset=Counting()
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    continued = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, a), (_, b) in zip(whole.named_parameters(), continued.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_load_best_model_at_end(tmp_path):
    model = load(tmp_path)
    settings = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.05,  # high enough that the last state is not the best one
    }
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=Counting(), eval_dataset=Counting(8))
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-4)


def test_trained_model_saves_and_loads(tmp_path):
    model = load(tmp_path)
    Trainer(model, arguments(tmp_path), train_dataset=Counting()).train()
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = Counting()[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_classifier_fine_tunes_from_a_language_model(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3"]())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "release", num_labels=2, dtype=torch.float32)
    rows = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(Counting())]
    trainer = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.score.weight, model.score.weight)


@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8-resident"])
def test_lora_trains_on_attention(tmp_path, fp8):
    peft = pytest.importorskip("peft")
    write_release(tmp_path / "release", SHAPES["v3"](), fp8=fp8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules=["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    trainer = Trainer(wrapped, arguments(tmp_path, max_steps=12, learning_rate=3e-2), train_dataset=Counting())
    trainer.train()
    history = losses(trainer)
    assert sum(history[-2:]) < 0.9 * sum(history[:2])
    # the absorbed path must see the adapter too, though it reads kv_b_proj's weight rather than its output
    ids = Counting()[0]["input_ids"][None]
    wrapped.eval()
    with torch.no_grad():
        both = [wrapped(ids, mla_path=path).logits for path in ("expanded", "absorbed")]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
