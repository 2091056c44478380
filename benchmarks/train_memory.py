"""Peak memory of training on a CPU: what `deepseek-moe plan --train` predicts, and what a process takes.

    python benchmarks/train_memory.py [--only NAME]

Each case is a process of its own, one at a time: it trains a small model for a step, so that all libraries are there, loads the
model of random weights, and trains it for three steps under `Trainer`. Measured is the most of its memory that no file gives back, every
10 ms from the moment that the model is loaded (Linux), less what there was of it before; of a model in FP8 with the pages of its files, in
which the experts stay.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli._train_lora import LoraOptions, add_adapter, four_bit
from modeling_deepseek_moe.cli._train_memory import spare_memory
from modeling_deepseek_moe.training_memory import LORA, QLORA, TrainingSetup, predict_training_memory

STEPS = 3
V3 = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
}
# V2-Lite's proportions: no query latent, more and narrower experts, a smaller vocabulary
NARROW = V3 | {
    "n_routed_experts": 64,
    "moe_intermediate_size": 128,
    "q_lora_rank": None,
    "vocab_size": 8192,
    "n_group": 1,
}
NARROW |= {"topk_group": 1, "num_experts_per_tok": 6, "n_shared_experts": 2}
SMALL = {"hidden_size": 128, "vocab_size": 512, "num_hidden_layers": 2, "moe_intermediate_size": 64}
CASES = {
    "full": (V3, "float32", TrainingSetup(batch_size=2, seq_length=256)),
    "full, long": (V3, "float32", TrainingSetup(batch_size=4, seq_length=1024)),
    "full, long, checkpointing": (
        V3,
        "float32",
        TrainingSetup(batch_size=4, seq_length=1024, gradient_checkpointing=True),
    ),
    "full, bf16": (V3, "bfloat16", TrainingSetup(batch_size=4, seq_length=512, itemsize=2)),
    "full, 8-bit moments": (NARROW, "float32", TrainingSetup(batch_size=2, seq_length=512, optim="adamw_bnb_8bit")),
    "full, narrow experts": (NARROW, "float32", TrainingSetup(batch_size=8, seq_length=512)),
    "lora": (V3, "bfloat16", TrainingSetup(LORA, batch_size=4, seq_length=512, itemsize=2)),
    "lora, long, checkpointing": (
        V3,
        "bfloat16",
        TrainingSetup(LORA, batch_size=4, seq_length=1024, itemsize=2, gradient_checkpointing=True),
    ),
    "lora, FP8": (V3, "fp8", TrainingSetup(LORA, batch_size=4, seq_length=512, itemsize=2)),
    "lora, narrow experts, rank 64": (
        NARROW,
        "bfloat16",
        TrainingSetup(LORA, rank=64, batch_size=2, seq_length=512, itemsize=2),
    ),
    "qlora": (
        V3,
        "bfloat16",
        TrainingSetup(QLORA, batch_size=4, seq_length=512, itemsize=2, optim="paged_adamw_8bit"),
    ),
    "qlora, narrow experts": (NARROW, "bfloat16", TrainingSetup(QLORA, batch_size=8, seq_length=512, itemsize=2)),
}


class Peak(threading.Thread):
    """The most bytes that this process has held since it was started, looked up every 10 ms."""

    def __init__(self, with_files: bool):
        super().__init__(daemon=True)
        self.fields = ("RssAnon", "RssFile") if with_files else ("RssAnon",)
        self.most, self.ended = 0, threading.Event()

    def now(self) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(lines[field].split()[0]) for field in self.fields) * 1024

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, self.now())


def train(folder: Path, name: str, steps: int) -> int:
    _, dtype, setup = CASES[name]
    kind = torch.float32 if setup.itemsize == 4 else torch.bfloat16
    settings = {"quantization_config": four_bit(kind)} if setup.method == QLORA else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **settings)
    if not setup.is_full:
        model = add_adapter(model, LoraOptions(lora=True, lora_rank=setup.rank))
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    ids = torch.randint(3, vocab_size, (setup.batch_size * steps, setup.seq_length))
    arguments = TrainingArguments(
        f"{folder}/out",
        per_device_train_batch_size=setup.batch_size,
        max_steps=steps,
        optim=setup.optim,
        gradient_checkpointing=setup.gradient_checkpointing,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows)
    tidy()
    peak = Peak(dtype == "fp8")
    peak.start()
    trainer.train()
    peak.ended.set()
    peak.join()
    return peak.most


def tidy() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name: str, small: Path, folder: Path) -> int:
    """Bytes, in this process, which is to have done nothing before."""
    spare_memory()
    train(small, name, 1)
    tidy()
    before = Peak(CASES[name][1] == "fp8").now()
    return train(folder, name, STEPS) - before


def write(config: dict, dtype: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**config))
    if dtype == "fp8":
        model.bfloat16().save_pretrained(folder, quantize="fp8")
    else:
        model.to(getattr(torch, dtype)).save_pretrained(folder)


def run(name: str) -> dict:
    config, dtype, setup = CASES[name]
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, "small"), Path(root, "model")]
        for folder, shape in zip(folders, (config | SMALL, config), strict=True):
            write(shape, dtype, folder)
        command = [sys.executable, __file__, "--child", name, "--folders", *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        predicted = predict_training_memory(AutoConfig.from_pretrained(folders[1]), setup)
    measured = int(done.stdout.split()[-1])
    return {"case": name, "measured": measured, **vars(predicted), "ratio": predicted.peak / measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", choices=CASES, action="append", help="one case, the others stay as they are; again for others"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(measure(given.child, *given.folders))
        return
    rows = []
    table = Table(title="peak memory of a training step, MB")
    for column in (
        "",
        "measured",
        "predicted",
        "ratio",
        "weights",
        "adapter",
        "gradients",
        "states",
        "kept",
        "logits",
        "peak in",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name in given.only or CASES:
        rows.append(row := run(name))
        print(json.dumps(row), flush=True)
        parts = ("measured", "peak", "ratio", "weights", "adapter", "gradients", "optimizer", "activations", "logits")
        cells = [f"{row[part]:.2f}" if part == "ratio" else f"{row[part] / 1e6:,.0f}" for part in parts]
        table.add_row(name, *cells, row["peak_at"])
    Console(width=140).print(table)
    file = common.RESULTS / "train_memory.json"
    before = json.loads(file.read_text())["rows"] if given.only and file.exists() else []
    known = {row["case"]: row for row in (*before, *rows)}
    print(f"written to {common.save('train_memory', {'rows': [known[name] for name in CASES if name in known]})}")


if __name__ == "__main__":
    main()
