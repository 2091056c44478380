"""Adapters as peft, and the libraries of older transformers, make and store them."""

import json

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Trainer, TrainingArguments

from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts

IDS = torch.arange(10, 26)[None]
ATTENTION = ["q_b_proj", "o_proj"]
MLP = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | kwargs)).eval()


def dequantised(folder):
    return load(folder, quantization_config=FineGrainedFP8Config(dequantize=True))


def stacked(folder, **kwargs):
    """The model with its FP8 experts as stacks in memory, as on another device than the CPU."""
    model = load(folder, **kwargs)
    for layer in model.model.layers:
        mapped = getattr(layer.mlp, "experts", None)
        if not isinstance(mapped, MappedExperts):
            continue
        stacks = StackedQuantizedExperts(model.config, mapped.weight_format)
        for index in range(mapped.num_experts):
            for own, stored in zip(stacks.matrices(index).values(), mapped.matrices(index).values(), strict=True):
                for mine, value in zip(own, stored, strict=True):
                    mine.copy_(value)
        layer.mlp.experts = stacks.eval()
    return model


def plain(folder, **kwargs):
    """Transformers' own class on the same folder."""
    text = json.loads((folder / "config.json").read_text())["model_type"]
    family = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}[text]
    config = getattr(transformers, f"{family}Config").from_pretrained(folder)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    return model_class.from_pretrained(folder, config=config, **({"dtype": torch.float32} | kwargs)).eval()


def adapted(model, **kind):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "init_lora_weights": False} | kind)).eval()


def train(model, folder, resume=None, **settings) -> list[float]:
    """Four steps with a checkpoint after each second one, or those after ``resume``: the loss of each."""
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(4, 12)]
    arguments = TrainingArguments(
        folder, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def doors(base, adapter):
    """An adapter's folder on the model in ``base``, by every way that loads one."""
    loaded = load(base)
    loaded.load_adapter(adapter)
    return {
        "PeftModel": peft.PeftModel.from_pretrained(load(base), adapter),
        "load_adapter": loaded,
        "from_pretrained": load(adapter),
        "AutoPeftModelForCausalLM": peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
    }


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def expert_adapter(folder, model, projections, **config):
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
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": projections, "inference_mode": True}
    config = settings | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
