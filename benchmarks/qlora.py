"""QLoRA on a CPU: what a step takes and what a process holds, here and in plain transformers, with the same peft and bitsandbytes.

    python benchmarks/qlora.py [--only NAME] [--steps N] [--turns N]      five minutes on one core, 2 GB of memory

A dense layer and one of experts in DeepSeek-V2-Lite's dims with a small vocabulary, random weights in bf16; the rows are the text of
this project's docs in bytes, the same for all. bitsandbytes quantises linear layers alone in plain transformers, whose experts stay bf16; here
they are NF4 as well. Contestants, each in a process of its own, in turns:

    attention   LoRA on the linear layers of attention
    experts     LoRA on those and on all routed experts, whose dense difference plain peft makes at each forward

Reported are the median of the steps after the first, in seconds of the processor, which other programs on the machine change little, and by
the clock; the most memory that no file gives back over the whole training and while loading; the loss of the first and the last step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import transformers
from cpu_e2e import CONFIG
from train_memory import Peak
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli._train_memory import spare_memory

SHAPE = CONFIG | {"num_hidden_layers": 2, "vocab_size": 8192, "n_routed_experts": 32, "intermediate_size": 5632}
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
}
WHO = {"this package": AutoModelForCausalLM, "plain": transformers.DeepseekV3ForCausalLM}
CASES = {f"{kind}, {who}": (kind, who) for kind in KINDS for who in WHO}
BATCH, LENGTH = 2, 128


class Clock(TrainerCallback):
    """The seconds of every step, the optimizer's included: of the clock, and of processors in all threads of this process."""

    def __init__(self):
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self._begin = (0.0, 0.0)

    def on_step_begin(self, *arguments, **named):
        self._begin = (time.perf_counter(), time.process_time())

    def on_step_end(self, *arguments, **named):
        self.seconds.append(time.perf_counter() - self._begin[0])
        self.processor.append(time.process_time() - self._begin[1])


def texts() -> list[int]:
    """The project's docs as bytes, which are tokens here."""
    root = Path(__file__).parents[1]
    files = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return list(b"".join(file.read_bytes() for file in files))


def train(folder: Path, name: str, steps: int) -> dict:
    """In this process, which is to have done nothing before."""
    import peft

    kind, who = CASES[name]
    spare_memory()
    torch.manual_seed(0)
    peak = Peak(with_files=False)
    peak.start()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = WHO[who].from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    loaded = {"load_peak": peak.most, "held_bytes": model.get_memory_footprint()}
    peak.most = 0
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, **KINDS[kind]))
    ids = torch.tensor(texts()[: BATCH * LENGTH * steps]).view(-1, LENGTH)
    clock = Clock()
    arguments = TrainingArguments(
        f"{folder}/out-{os.getpid()}",
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        optim="adamw_bnb_8bit",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
    trainer.train()
    peak.ended.set()
    peak.join()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = {"steps": clock.seconds, "processor": clock.processor}
    return loaded | seconds | {"train_peak": peak.most, "first_loss": losses[0], "last_loss": losses[-1]}


def write(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**SHAPE))
    torch.set_default_dtype(before)
    model.save_pretrained(folder)


def run(name: str, folder: Path, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--steps", str(options.steps)]
    done = subprocess.run([*command, "--threads", str(options.threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def summary(name: str, found: list[dict]) -> dict:
    """Of one contestant's turns: medians of their steps, the first of each left out, and the largest peaks."""
    times = {}
    for key, name_of in (("steps", "step_s"), ("processor", "step_processor_s")):
        steps = [seconds for turn in found for seconds in turn[key][1:]]
        times |= {name_of: statistics.median(steps), f"fastest_{name_of}": min(steps), "samples": len(steps)}
    most = {key: max(turn[key] for turn in found) for key in ("load_peak", "train_peak")}
    same = {key: found[0][key] for key in ("held_bytes", "first_loss", "last_loss")}
    return {"case": name, **times, **most, **same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=CASES, action="append", help="one contestant, the others stay as they are; again for more"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; with more than one, those that wait count as well"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the model is written, or found (default: temporary)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(train(options.folder, options.child, options.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "model")
        if not (folder / "config.json").exists():
            write(folder)
        found: dict[str, list[dict]] = {name: [] for name in options.only or CASES}
        for _ in range(options.turns):
            for name, turns in found.items():
                turns.append(run(name, folder, options))
                print(name, json.dumps(turns[-1]), flush=True)
    rows = [summary(name, turns) for name, turns in found.items()]
    for row in rows:
        print(
            f"{row['case']:24} {row['step_processor_s']:6.2f} s a step, {row['step_s']:.2f} by the clock  "
            f"{row['train_peak'] / 1e9:5.2f} GB training  {row['load_peak'] / 1e9:5.2f} "
            f"loading  {row['held_bytes'] / 1e9:5.2f} of weights  loss {row['first_loss']:.2f} -> {row['last_loss']:.2f}"
        )
    file = common.RESULTS / "qlora.json"
    before = json.loads(file.read_text())["rows"] if options.only and file.exists() else []
    known = {row["case"]: row for row in (*before, *rows)}
    kept = [known[name] for name in CASES if name in known]
    print(f"written to {common.save('qlora', {'rows': kept, 'config': SHAPE, 'batch': BATCH, 'length': LENGTH})}")


if __name__ == "__main__":
    main()
