"""TRL given a path, and DDP with checkpointing on a folder with MTP layers, next to plain transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from releases import SHAPES, write_release, write_tiny_fp32
from training_harness import Padded
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_deepseek_moe as dsm

pytestmark = pytest.mark.tools

ROWS = [{"prompt": f"Solve x + {i} = 11 for x.", "chosen": " x = 7", "rejected": " no"} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_fp32(tmp_path_factory.mktemp("fp32"))


@pytest.mark.parametrize("by", ["path", "model"])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trains_this_class(folder, tmp_path, kind, by):
    import trl
    from datasets import Dataset

    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        max_length=64,
        model_init_kwargs={"architecture": AutoModelForCausalLM},
    )
    rows = ROWS if kind == "DPO" else [{"text": row["prompt"] + row["chosen"]} for row in ROWS]
    model = str(folder) if by == "path" else AutoModelForCausalLM.from_pretrained(folder)
    trainer = getattr(trl, f"{kind}Trainer")(model, args=arguments, train_dataset=Dataset.from_list(rows))
    assert type(trainer.model) is dsm.DeepseekV3ForCausalLM
    if kind == "DPO":
        assert type(trainer.accelerator.unwrap_model(trainer.ref_model)) is dsm.DeepseekV3ForCausalLM
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert kind == "SFT" or losses[0] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.slow
def test_trl_trains_an_adapter_on_four_bits(tmp_path):
    """QLoRA by `SFTTrainer` itself, on the release in FP8: experts too, and what it saves loads on the release."""
    import trl
    from datasets import Dataset
    from transformers import BitsAndBytesConfig

    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        dsm.tiny_checkpoint(), quantization_config=four_bit, dtype=torch.bfloat16, num_nextn_predict_layers=0
    )
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        logging_steps=1,
        learning_rate=5e-3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        max_length=64,
        optim="paged_adamw_8bit",
        gradient_checkpointing=True,
        model_init_kwargs={"architecture": AutoModelForCausalLM},
    )
    targets = ["kv_b_proj", *(f"shared_experts.{name}_proj" for name in ("gate", "up", "down"))]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, target_parameters=experts, task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in ROWS[:1] * 4])
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, peft_config=config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), num_nextn_predict_layers=0)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    found = {name: parameter for name, parameter in loaded.named_parameters() if "lora_B" in name}
    for part in (".kv_b_proj.", ".shared_experts.up_proj.", ".experts.lora_B", ".experts.base_layer.lora_B"):
        moved = [bool(parameter.detach().abs().sum() > 0) for name, parameter in found.items() if part in name]
        assert moved and all(moved), part


def train(folder, out, who, reentrant):
    if who == "plain":
        config = transformers.DeepseekV3Config.from_pretrained(folder)
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype="float32")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    arguments = TrainingArguments(
        str(out),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    callbacks = [dsm.MtpLossCallback()] if who == "mtp" else []
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".layers.3." in name}
    trainer = Trainer(model, arguments, train_dataset=Padded(), callbacks=callbacks)
    if who == "mtp" and reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            trainer.train()
        return
    trainer.train()
    changed = [name for name, p in model.named_parameters() if name in before and not p.equal(before[name])]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sums = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
    name = f"{who}-{trainer.args.process_index}.json"
    (Path(out) / name).write_text(json.dumps({"losses": losses, "changed": len(changed), "sum": sums}))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.slow
def test_ddp_with_checkpointing_has_the_losses_of_plain(tmp_path, reentrant):
    write_release(tmp_path / "release", SHAPES["v3-mtp"]())
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path, str(int(reentrant))]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, timeout=300)
    runs = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert runs["ours-0"]["losses"] == pytest.approx(runs["plain-0"]["losses"], rel=1e-4)
    assert runs["ours-0"]["changed"] == 0  # the MTP layer
    if reentrant:
        assert "mtp-0" not in runs  # refused: the ranks would drift apart
    else:
        assert runs["mtp-0"]["changed"] > 0 and runs["mtp-0"]["sum"] == runs["mtp-1"]["sum"]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for who in ("plain", "ours", "mtp"):
        train(root / "release", root, who, sys.argv[2] == "1")
