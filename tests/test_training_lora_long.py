"""Three hundred steps of LoRA on attention, shared and routed experts, on each kind of base: real text, and loss on rows that are held out."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Trainer,
    TrainingArguments,
)

import modeling_deepseek_moe as dsm

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
LENGTH, STEPS, EVERY = 128, 300, 100
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = [f"shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def nf4(double, compute):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


BASES = {
    "fp32": (torch.float32, {"quantization_config": FineGrainedFP8Config(dequantize=True)}),
    "bf16": (torch.bfloat16, {"quantization_config": FineGrainedFP8Config(dequantize=True)}),
    "FP8": (torch.bfloat16, {}),
    "INT4": (torch.bfloat16, {}),
    "NF4": (torch.bfloat16, {"quantization_config": nf4(False, torch.bfloat16)}),
    "NF4, double": (torch.bfloat16, {"quantization_config": nf4(True, torch.bfloat16)}),
}


@pytest.fixture(scope="module")
def rows():
    """The project's documentation in rows of tokens: those to learn, and every tenth, which is held out."""
    tokenizer = AutoTokenizer.from_pretrained(dsm.tiny_checkpoint())
    text = "\n\n".join(file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    found = [{"input_ids": row, "labels": row} for row in found]
    return [row for number, row in enumerate(found) if number % 10], found[::10]


@pytest.mark.parametrize("name", BASES)
def test_loss_on_rows_that_are_held_out_falls(name, rows, tmp_path):
    dtype, settings = BASES[name]
    folder = Path(dsm.tiny_checkpoint())
    if name == "INT4":
        source = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=FineGrainedFP8Config(dequantize=True)
        )
        source.save_pretrained(folder := tmp_path / "int4", quantize="int4")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, num_nextn_predict_layers=0, **settings)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[*ATTENTION, *SHARED], target_parameters=EXPERTS)
    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=EVERY,
        eval_on_start=True,
        logging_steps=50,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    learned, held_out = rows
    trainer = Trainer(peft.get_peft_model(model, config), arguments, train_dataset=learned, eval_dataset=held_out[:32])
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"\n{name}: held out {' '.join(f'{loss:.3f}' for loss in found)}; train {' '.join(f'{loss:.3f}' for loss in logged)}"
    )
    assert len(found) == STEPS // EVERY + 1
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.6 * found[0]
    assert logged == sorted(logged, reverse=True)
