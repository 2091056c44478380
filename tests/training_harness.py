"""A short training whose loads and biases are recorded; run as a program it is one rank of several.

``python training_harness.py FOLDER RUNS`` with ``{name: settings of `train`}`` as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from releases import SHAPES, write_release
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed

import modeling_deepseek_moe as dsm


class Padded(Dataset):
    """Rows that count up from random starts, each padded to the right by another length."""

    def __init__(self, rows=48, length=20):
        self.rows = []
        for row in range(rows):
            ids = (torch.arange(length) + 5 * row) % 120 + 3
            mask = (torch.arange(length) < length - row % 7).long()
            labels = ids.masked_fill(mask == 0, -100)
            self.rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Record(TrainerCallback):
    """The biases after every optimizer step, and every figure that is logged."""

    def __init__(self):
        self.biases, self.logs = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        named = model.named_buffers()
        self.biases.append({k: b.tolist() for k, b in named if k.endswith("e_score_correction_bias")})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


def load(folder: Path, dtype=torch.float64, kind="v3-mtp"):
    if not (folder / "release").exists():
        write_release(folder / "release", SHAPES[kind]())
    return AutoModelForCausalLM.from_pretrained(folder / "release", dtype=dtype)


def arguments(folder, **settings):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(str(folder), **(defaults | settings))


def train(
    folder, *, dtype="float64", mtp=True, alpha=1e-3, gamma=0.01, until=1.0, resume=None, release=None, **settings
):
    """Train and return ``{"biases": [...], "loads": [...], "logs": [...]}``, one entry a step."""
    set_seed(0)
    folder = Path(folder)
    model = load(Path(release or folder), getattr(torch, dtype))
    record = Record()
    callbacks = [
        dsm.LoadBalanceCallback(gamma, until),
        dsm.BalanceLossCallback(alpha),
        dsm.MoeTelemetryCallback(),
        record,
    ]
    if mtp:
        callbacks.append(dsm.MtpLossCallback())
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=Padded(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    loads = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text().splitlines()]
    return {"biases": record.biases, "loads": loads, "logs": record.logs, "model": model}


def train_by_hand(
    folder, *, release, steps=3, shard=False, rank=0, ranks=1, dtype="float64", mtp=False, fp8_wgrad=None
):
    """A loop of one's own: the rows of each step divided among the ranks, the layers sharded by FSDP2."""
    model = load(Path(release), getattr(torch, dtype)).train()
    if fp8_wgrad is not None:
        dsm.prepare_fp8_training(model, dsm.Fp8TrainingConfig(fp8_wgrad))
    callbacks, record = [dsm.LoadBalanceCallback(0.01), *([dsm.MtpLossCallback()] if mtp else [])], Record()
    state = TrainerState(max_steps=steps, global_step=0)
    for callback in callbacks:
        callback.on_init_end(None, state, None, model=model)
    if shard:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loads, losses = [], []
    for callback in callbacks:
        callback.on_train_begin(None, state, None, model=model)
    rows = Padded(8 * steps).rows
    for step in range(steps):
        part = rows[8 * step + rank : 8 * step + 8 : ranks]
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
        items = sum(int((row["labels"][1:] != -100).sum()) for row in rows[8 * step : 8 * step + 8])
        for callback in callbacks:
            callback.on_step_begin(None, state, None, model=model)
        loss = model(**batch, num_items_in_batch=torch.tensor(items)).loss
        (loss * ranks).backward()  # gradients are averaged
        total = loss.detach().clone()
        if shard:
            torch.distributed.all_reduce(total)
        losses.append(total.item())
        for callback in callbacks:
            callback.on_pre_optimizer_step(None, state, None, model=model)
        optimizer.step()
        optimizer.zero_grad()
        record.on_step_end(None, state, None, model=model)
        loads.append({layer: load.tolist() for layer, load in model.model.training_state.step_loads.items()})
        state.global_step += 1
    return {"biases": record.biases, "loads": loads, "losses": losses, "model": model}


def train_on_ranks(folder: Path, ranks: int, **runs: dict) -> dict[str, list[dict]]:
    """`train` on several processes with gloo, in ``folder/name`` with the settings of each run: what each rank found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        command = [sys.executable, __file__, str(folder), json.dumps(runs)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return {
        name: [json.loads((folder / name / f"rank-{rank}.json").read_text()) for rank in range(ranks)] for name in runs
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, settings in json.loads(sys.argv[2]).items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(exist_ok=True)
        if settings.pop("by_hand", False):
            rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            found = train_by_hand(folder, rank=rank, ranks=ranks, **settings)
        else:
            found = train(folder, ddp_backend="gloo", **settings)
        kinds = {type(parameter).__name__ for parameter in found.pop("model").parameters()}
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found | {"kinds": sorted(kinds)}))
