"""What attention to chosen keys costs in quality: one small model on real text, dense to the end, and through the indexer's stages.

    python benchmarks/indexer.py [--text FILE ...] [--length 192] [--topk 48]

Both begin as one model that was trained with attention to every key (``index_topk`` as long as the rows). One goes on so. The
other's indexers warm up, the model frozen, and it goes on over ``--topk`` keys with the same rows and learning rates. Then
held-out rows, the last tenth of the text, are scored: by the dense model; by the sparse one; by the dense model's weights over
the keys that the warmed-up indexers choose, that untrained ones choose, and the newest ones. The text is this package's own code
and documents unless files are given; its bytes are the tokens.
"""

import argparse
import copy
import itertools
import tempfile
import time
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.indexer import DeepseekIndexer

ROOT = Path(__file__).resolve().parents[1]
OWN = ("README.md", "CHANGELOG.md", "docs/*.md", "modeling_deepseek_moe/**/*.py")
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
BATCH_ROWS, RATE = 8, 2e-3


def read_rows(files: list[Path], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of bytes ``[rows, length]`` to train on, in one order, and held out."""
    text = b"\n".join(file.read_bytes() for file in files)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    cut = len(rows) * 9 // 10
    order = torch.randperm(cut, generator=torch.Generator().manual_seed(0))
    return rows[:cut][order], rows[cut:]


def train(
    model: PreTrainedModel, rows: torch.Tensor, rate: float, last_rate: float, stage: str | None = None
) -> list[dict]:
    """One pass over the rows, the learning rate falling in a line; what was logged."""
    callbacks = [dsm.LoadBalanceCallback()] if stage != "dense" else []
    callbacks += [dsm.IndexerLossCallback(stage)] if stage else []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH_ROWS,
            max_steps=len(rows) // BATCH_ROWS,
            learning_rate=rate,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"lr_end": last_rate, "power": 1.0},
            warmup_steps=50 if stage is None and last_rate > 0 else 0,
            logging_steps=25,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks, dsm.MoeTelemetryCallback()])
        trainer.train()
    return trainer.state.log_history


@torch.no_grad()
def loss(model: PreTrainedModel, rows: torch.Tensor, topk: int) -> float:
    """Mean over all predicted tokens, attending to ``topk`` keys."""
    model.eval()
    kept, model.config.index_topk = model.config.index_topk, topk
    found = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    model.config.index_topk = kept
    return sum(found) / len(rows)


class Newest(torch.nn.Module):
    """In an indexer's place: the newest keys. As a model with a sliding window has it."""

    def __init__(self, indexer: DeepseekIndexer, topk: int):
        super().__init__()
        self.topk, self.keys = topk, indexer.keys

    def forward(self, hidden_states, q_latent, position_embeddings, keys, mask=None):
        last = torch.arange(hidden_states.shape[1])[:, None]
        first = (last - self.topk + 1).clamp_min(0)
        index = first + torch.arange(self.topk)
        return index.masked_fill(index > last, -1).to(torch.int32).expand(hidden_states.shape[0], -1, -1)


def with_topk(model: PreTrainedModel, topk: int) -> PreTrainedModel:
    """A copy that attends to ``topk`` keys."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, DeepseekIndexer):
            module.topk = topk
    made.config.index_topk = topk
    return made


def newest(model: PreTrainedModel, topk: int) -> PreTrainedModel:
    made = with_topk(model, topk)
    for layer in made.model.layers:
        layer.self_attn.indexer = Newest(layer.self_attn.indexer, topk)
    return made


def measure(files: list[Path], length: int, topk: int, steps: tuple[int, int, int]) -> dict:
    rows, held_out = read_rows(files, length)
    first, warm_up, last = (count * BATCH_ROWS for count in steps)
    needed = -(-(first + warm_up + last) // len(rows))
    rows = rows.repeat(needed, 1)
    begun, warm, rest = rows[:first], rows[first : first + warm_up], rows[first : first + last]
    set_seed(0)
    config = AutoConfig.for_model("deepseek_v32", **SHAPE, max_position_embeddings=length, index_topk=length)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    seconds = [time.perf_counter()]
    train(model, begun, RATE, RATE / 2)
    untrained = with_topk(model, topk)
    seconds.append(time.perf_counter())
    log = train(sparse := with_topk(model, topk), warm, 1e-2, 1e-3, "dense")
    seconds.append(time.perf_counter())
    found = {
        "one model so far, every key": loss(model, held_out, length),
        "its warmed-up indexers' keys": loss(sparse, held_out, topk),
        "untrained indexers' keys": loss(untrained, held_out, topk),
        "the newest keys": loss(newest(model, topk), held_out, topk),
    }
    set_seed(1)
    train(model, rest, RATE / 2, 0.0)
    seconds.append(time.perf_counter())
    set_seed(1)
    ends = train(sparse, rest, RATE / 2, 0.0, "sparse")
    seconds.append(time.perf_counter())
    dense = loss(model, held_out, length)
    found |= {"dense to the end": dense, "sparse to the end": loss(sparse, held_out, topk)}
    divergence = [[entry["indexer_loss"] for entry in part if "indexer_loss" in entry] for part in (log, ends)]
    return {
        "losses": found,
        "sparse_over_dense": found["sparse to the end"] / dense,
        "indexer_loss": {
            "warm_up": divergence[0][:: len(divergence[0]) - 1],
            "sparse": divergence[1][:: len(divergence[1]) - 1],
        },
        "seconds": [after - before for before, after in itertools.pairwise(seconds)],
        "tokens": {"trained": len(rows) * length, "held_out": held_out.numel()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="files (default: this package's own)")
    parser.add_argument("--length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--topk", type=int, default=48, help="keys that a query attends to")
    parser.add_argument("--steps", type=int, nargs=3, default=(600, 150, 250), help="dense, warm-up, and after it")
    given = parser.parse_args()
    files = given.text or sorted(file for pattern in OWN for file in ROOT.glob(pattern))
    found = measure(files, given.length, given.topk, tuple(given.steps))
    table = Table("held-out loss", "nats", title=f"{given.topk} of {given.length} keys, steps {tuple(given.steps)}")
    for name, value in found["losses"].items():
        table.add_row(name, f"{value:.4f}")
    Console(width=100).print(table)
    print(f"sparse / dense {found['sparse_over_dense']:.4f}; indexer loss {found['indexer_loss']}; {found['seconds']}")
    fields = {"length": given.length, "topk": given.topk, "steps": given.steps}
    print(f"written to {common.save('indexer', fields | found)}")


if __name__ == "__main__":
    main()
