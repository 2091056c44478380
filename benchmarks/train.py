"""A training step under the plain `Trainer` on a CPU: plain transformers, this package, and that with balancing and telemetry.

    python benchmarks/train.py [--rounds 8] [--small]

All start from the same weights and see the same rows in the same order. In every round each trains for ten optimizer steps under a
`Trainer` of its own, logging every five; the first three are not counted. A step is timed from the end of the one before:
data, forward, backward, optimizer, callbacks and logs. ``of peak`` is 6 × active parameters × tokens / time over the
FLOP/s of a square matrix product of that dtype measured in this run.
"""

import argparse
import itertools
import resource
import tempfile
import time
from pathlib import Path

import common
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainingArguments

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import parameter_breakdown

ROWS, TOKENS = 4, 256
STEPS, UNCOUNTED = 10, 3
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": TOKENS,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "vocab_size": 256,
}


class Clock(TrainerCallback):
    """When each step ended, and how often other programs had taken the processor by then."""

    def __init__(self):
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw))


class Contestant:
    def __init__(self, model, folder: Path, bf16: bool, callbacks: list[type[TrainerCallback]]):
        self.model, self.callbacks = model, callbacks
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (ROWS * STEPS, TOKENS), generator=generator)
        self.rows = [{"input_ids": row, "labels": row} for row in ids]
        self.settings = TrainingArguments(
            str(folder),
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            learning_rate=1e-4,
            logging_steps=5,
            bf16=bf16,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        self.seconds: list[float] = []
        self.disturbed: list[bool] = []

    def train(self) -> None:
        clock = Clock()
        callbacks = [*(make() for make in self.callbacks), clock]
        trainer = Trainer(self.model, self.settings, train_dataset=self.rows, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        for (start, before), (end, after) in itertools.pairwise(clock.ends[UNCOUNTED - 1 :]):
            self.seconds.append(end - start)
            self.disturbed.append(after - before > common.QUIET_SWITCHES * (end - start))

    @property
    def timing(self) -> common.Timing:
        return common.Timing(tuple(self.seconds), tuple(self.disturbed))


def race(config: dict, bf16: bool, rounds: int) -> list[dict]:
    model_config = dsm.DeepseekV3Config(**config)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        dsm.DeepseekV3ForCausalLM(model_config).save_pretrained(folder / "weights")

        def load(kind):
            return kind.from_pretrained(folder / "weights", dtype=torch.float32)

        def make(name, kind, callbacks):
            return Contestant(load(kind), folder / name.replace(" ", "-"), bf16, callbacks)

        balancing = [dsm.LoadBalanceCallback, dsm.MoeTelemetryCallback]
        contestants = {
            "transformers": make("transformers", transformers.DeepseekV3ForCausalLM, []),
            "this package": make("this package", dsm.DeepseekV3ForCausalLM, []),
            "balancing, telemetry": make("balancing, telemetry", dsm.DeepseekV3ForCausalLM, balancing),
        }
        for _ in range(rounds):
            for contestant in contestants.values():
                contestant.train()
    timings = {name: contestant.timing for name, contestant in contestants.items()}
    flops = 6 * parameter_breakdown(model_config).active_parameters * ROWS * TOKENS
    peak = common.gemm_flops(torch.bfloat16 if bf16 else torch.float32)
    plain = timings["transformers"].median
    return [
        {
            "dtype": "bf16 autocast" if bf16 else "fp32",
            "contestant": name,
            **timing.fields(),
            "ratio": timing.median / plain,
            "of_peak": flops / timing.median / peak,
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="of ten steps of each (default: 8)")
    parser.add_argument("--small", action="store_true", help="a small model, to see that it works; saves nothing")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = CONFIG | (SMALL if given.small else {})
    rows = [row for bf16 in (False, True) for row in race(config, bf16, given.rounds)]
    table = Table(title=f"a training step, {ROWS} rows of {TOKENS} tokens")
    for name in ("", "contestant", "ms", "least", "spread", "disturbed", "ratio", "of peak"):
        table.add_column(name, justify="left" if name in ("", "contestant") else "right")
    for row in rows:
        table.add_row(
            row["dtype"],
            row["contestant"],
            f"{row['ms']:.1f}",
            f"{row['min_ms']:.1f}",
            f"{row['spread']:.0%}",
            f"{row['disturbed']}/{row['samples']}",
            f"{row['ratio']:.3f}",
            f"{row['of_peak']:.0%}",
        )
    Console(width=110).print(table)
    if not given.small:
        print(f"written to {common.save('train', {'config': config, 'rows': rows})}")


if __name__ == "__main__":
    main()
