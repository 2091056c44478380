"""Peak memory of each of two processes that train together: what `deepseek-moe plan --train --gpus` predicts, and what they take.

    python benchmarks/plan_train.py [--only NAME]

Each case is two processes of its own, on a CPU and gloo: plain PyTorch's DDP or FSDP2 (`fully_shard` on each layer, then on the
model), AdamW, three steps. Measured is the most memory of a process that no file gives back, every 10 ms, less what there was
before the model, when a small one had been trained in the same way; the larger of the two ranks.
"""

import argparse
import json
import subprocess
import sys

import common
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from train_memory import SMALL, V3, Peak, tidy

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli._train_memory import spare_memory
from modeling_deepseek_moe.training_memory import TrainingSetup
from modeling_deepseek_moe.training_scale import Layout, rank_memory

STEPS, RANKS = 3, 2
CONFIG = V3 | {"vocab_size": 8192, "n_routed_experts": 16, "num_experts_per_tok": 4}
CASES = {
    "DDP": (False, TrainingSetup(batch_size=2, seq_length=256)),
    "DDP, checkpointing": (False, TrainingSetup(batch_size=4, seq_length=512, gradient_checkpointing=True)),
    "FSDP2": (True, TrainingSetup(batch_size=4, seq_length=256)),
    "FSDP2, checkpointing": (True, TrainingSetup(batch_size=4, seq_length=1024, gradient_checkpointing=True)),
}


def train(config: dict, name: str, rows: int, steps: int) -> int:
    """The most bytes that this process has held in these steps."""
    is_sharded, setup = CASES[name]
    torch.manual_seed(0)
    model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**config)).train()
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if is_sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run = model if is_sharded else DistributedDataParallel(model)
    tidy()
    peak = Peak(False)
    peak.start()
    for step in range(steps):
        torch.manual_seed(1000 * dist.get_rank() + step)
        ids = torch.randint(3, config["vocab_size"], (rows, setup.seq_length))
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak.ended.set()
    peak.join()
    return peak.most


def child(name: str) -> None:
    spare_memory()
    dist.init_process_group("gloo")
    train(CONFIG | SMALL, name, 1, 1)
    tidy()
    before = Peak(False).now()
    most = torch.tensor(train(CONFIG, name, CASES[name][1].batch_size, STEPS) - before)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(most.item())
    dist.destroy_process_group()


def run(name: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    done = subprocess.run([*command, "--child", name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    is_sharded, setup = CASES[name]
    predicted = rank_memory(dsm.DeepseekV3Config(**CONFIG), setup, Layout(data=RANKS, sharded=is_sharded))
    measured = int(done.stdout.split()[-1])
    return {"case": name, "measured": measured, **vars(predicted), "ratio": predicted.peak / measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=CASES, action="append", help="one case, the others stay as they are")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    file = common.RESULTS / "plan_train.json"
    found = {row["case"]: row for row in json.loads(file.read_text())["rows"]} if given.only and file.exists() else {}
    table = Table("", "measured", "predicted", "ratio", "at", title="peak memory of a rank, MB")
    for name in given.only or CASES:
        found[name] = row = run(name)
        print(json.dumps(row), flush=True)
        sizes = (f"{row[key] / 1e6:,.0f}" for key in ("measured", "peak"))
        table.add_row(name, *sizes, f"{row['ratio']:.2f}", row["peak_at"])
    rows = [found[name] for name in CASES if name in found]
    Console().print(table)
    print(f"written to {common.save('plan_train', {'ranks': RANKS, 'config': CONFIG, 'rows': rows})}")


if __name__ == "__main__":
    main()
