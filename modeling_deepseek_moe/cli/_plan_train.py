"""``deepseek-moe plan --train``: the memory that a training takes at its peak, by part, and whether this machine has it."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modeling_deepseek_moe.anatomy import describe
from modeling_deepseek_moe.cli._console import count, print_json, size, stderr, stdout
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.machine import memory
from modeling_deepseek_moe.training_memory import (
    FULL,
    PROCESS_BYTES,
    TrainingMemory,
    TrainingSetup,
    predict_training_memory,
)

PANEL = "Training"
FITS, TOO_LARGE = "fits", "does not fit"
ITEMSIZES = {"float32": 4, "bfloat16": 2}
TrainOption = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Memory to train it: full, lora (on the weights as they are) or qlora (on 4-bit ones), as `train` does.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
RankOption = Annotated[int | None, typer.Option(help="Rank of the adapter.", show_default="16", rich_help_panel=PANEL)]
BatchSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Rows of a batch on this machine.", show_default="8", rich_help_panel=PANEL)
]
SeqLengthOption = Annotated[
    int | None, typer.Option(help="Tokens of a row.", show_default="1024", rich_help_panel=PANEL)
]
OptimOption = Annotated[
    str | None,
    typer.Option(help="As TrainingArguments have it.", show_default="adamw_torch_fused", rich_help_panel=PANEL),
]
CheckpointingOption = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Keep a layer's input, and run it twice.", rich_help_panel=PANEL),
]
TrainDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--train-dtype",
        help="float32 or bfloat16.",
        show_default="float32 for full, else bfloat16",
        rich_help_panel=PANEL,
    ),
]


def read_setup(config: DeepseekMoeConfig, train: str | None, dtype: str | None, **given) -> TrainingSetup | None:
    """What is to be trained, and how; ``None`` where nothing is.

    Raises:
        ValueError: options of a training without one, or values that it cannot have.
    """
    given = {name: value for name, value in given.items() if value}
    if train is None:
        names = [*given, *(["train_dtype"] if dtype else [])]
        if names:
            options = ", ".join(
                f"--{'lora-rank' if name == 'rank' else name.replace('_', '-')}" for name in sorted(names)
            )
            raise ValueError(f"found {options} without --train, wanted --train full, lora or qlora")
        return None
    dtype = dtype or ("float32" if train == FULL else "bfloat16")
    if dtype not in ITEMSIZES:
        raise ValueError(f"--train-dtype: found {dtype!r}, wanted one of {', '.join(ITEMSIZES)}")
    mtp = train == FULL and bool(config.num_nextn_predict_layers)
    setup = TrainingSetup(method=train, itemsize=ITEMSIZES[dtype], mtp=mtp, **given)
    most = config.max_position_embeddings
    if setup.seq_length > most:
        stderr().print(f"[yellow]--seq-length: {setup.seq_length:,} tokens are more than the model's {most:,}.[/]")
    return setup


def plan_training(config: DeepseekMoeConfig, setup: TrainingSetup, as_json: bool) -> None:
    """Print what `predict_training_memory` says, as a table or JSON."""
    found = predict_training_memory(config, setup)
    _, available = memory()
    needed = found.peak + PROCESS_BYTES
    verdict = FITS if needed <= available else TOO_LARGE
    if as_json:
        fields = {"architecture": describe(config), "setup": asdict(setup), "memory": asdict(found)}
        print_json(fields | {"needed": needed, "available": available, "verdict": verdict})
        return
    _show(found, setup, needed, available, stdout())


def _show(found: TrainingMemory, setup: TrainingSetup, needed: int, available: int, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    kept = "autograd's, of all layers"
    if setup.gradient_checkpointing:
        kept = f"inputs of the layers, with checkpointing; {size(found.activations)} without"
    rows = (
        ("weights", found.weights, "in 4 bits but embedding, head and routers" if setup.method == "qlora" else ""),
        ("adapter", found.adapter, f"{count(found.trained_parameters)} parameters in fp32"),
        ("gradients", found.gradients, f"of {count(found.trained_parameters)} parameters"),
        ("optimizer", found.optimizer, setup.optim),
        ("activations", found.checkpoints if setup.gradient_checkpointing else found.activations, kept),
        ("logits", found.logits, f"of {setup.tokens:,} tokens, with their gradient"),
        ("retained", found.retained, "compiled products, and holes in the heap"),
        ("peak", found.peak, f"in one step, at: {found.peak_at}"),
        ("needed", needed, f"with {size(PROCESS_BYTES)} for the process; {size(available)} available"),
    )
    for name, nbytes, remark in rows:
        if nbytes:
            table.add_row(name, size(nbytes), remark)
    console.print(table)
    verdict, style = (FITS, "green") if needed <= available else (TOO_LARGE, "red")
    console.print(f"[{style}]{verdict}[/]")
    if verdict == TOO_LARGE and not setup.gradient_checkpointing:
        console.print(
            "Less: --gradient-checkpointing, a smaller --batch-size, --train qlora, --optim paged_adamw_8bit."
        )
