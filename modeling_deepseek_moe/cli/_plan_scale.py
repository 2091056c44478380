"""``deepseek-moe plan --train full --gpus 8x80GB --nodes 4``: which ways to divide a training fit, and how fast they are at best."""

import math
import re
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modeling_deepseek_moe.anatomy import describe
from modeling_deepseek_moe.checkpoint.writer import parse_size
from modeling_deepseek_moe.cli._console import count, plural, print_json, size, stdout
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.training_memory import TrainingSetup
from modeling_deepseek_moe.training_speed import (
    EFFICIENCY,
    RESERVED,
    Cluster,
    Run,
    flops_per_token,
    gpu_of,
    training_runs,
)

PANEL = "Training"
WIDEST = 200  # columns of a table
SHOWN = 8
GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help="Of a node, e.g. 8x80GB, to train on in place of this CPU.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Fp8Option = Annotated[
    bool, typer.Option("--fp8", help="Linear layers computed in FP8, on --gpus that can.", rich_help_panel=PANEL)
]
NodesOption = Annotated[int | None, typer.Option(min=1, help="Of --gpus.", show_default="1", rich_help_panel=PANEL)]


def read_cluster(gpus: str | None, nodes: int | None, train: str | None, fp8: bool) -> Cluster | None:
    """``None`` where none was asked for.

    Raises:
        ValueError: nodes without GPUs, GPUs without a training, or a text that is no count and size.
    """
    if gpus is None:
        if nodes is not None:
            raise ValueError("found --nodes without --gpus, wanted --gpus too, e.g. 8x80GB")
        if fp8:
            raise ValueError("found --fp8 without --gpus, wanted --gpus too, e.g. 8x80GB")
        return None
    if train is None:
        raise ValueError("found --gpus without --train, wanted --train full, lora or qlora")
    found = re.fullmatch(r"([1-9]\d{0,3})x(\S+)", gpus)
    if found is None or not parse_size(found[2]):
        raise ValueError(f"--gpus: found {gpus!r}, wanted how many in a node and their memory, e.g. 8x80GB")
    return Cluster(gpu_of(parse_size(found[2])), int(found[1]), nodes or 1)


def plan_scale(config: DeepseekMoeConfig, setup: TrainingSetup, cluster: Cluster, fp8: bool, as_json: bool) -> None:
    """Print what `training_runs` says, as a table or JSON."""
    runs = training_runs(config, setup, cluster, fp8)
    if as_json:
        verdict = "fits" if any(run.fits for run in runs) else "does not fit"
        fields = {
            "architecture": describe(config),
            "setup": asdict(setup),
            "cluster": asdict(cluster),
            "verdict": verdict,
        }
        made = [_fields(run) for run in runs]
        print_json(fields | {"flops_per_token": sum(flops_per_token(config, setup)), "layouts": made})
        return
    _show(config, setup, cluster, runs, stdout())


def _fields(run: Run) -> dict:
    """As JSON has it: no bound where nothing is sent."""
    named = {"name": run.layout.describe(), "expected": run.expected}
    return asdict(run) | named | ({"by_network": None} if math.isinf(run.by_network) else {})


def _show(
    config: DeepseekMoeConfig, setup: TrainingSetup, cluster: Cluster, runs: tuple[Run, ...], console: Console
) -> None:
    fitting = [run for run in runs if run.fits]
    gpu = cluster.gpu
    console.print(
        f"{plural(cluster.ranks, 'GPU')} of {size(gpu.memory)} in {plural(cluster.nodes, 'node')}, taken for {gpu.name}: "
        f"{gpu.flops / 1e12:,.0f} TFLOP/s in bf16, {size(gpu.bandwidth)}/s of memory, {size(gpu.link)}/s in a node, "
        f"{size(gpu.network)}/s between nodes"
    )
    console.print(
        f"{setup.batch_size} × {setup.seq_length:,} tokens a data-parallel rank and step, "
        f"{sum(flops_per_token(config, setup)) / 1e9:,.0f} GFLOP a token"
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    for header in ("weights", "gradients", "moments", "kept", "buffers", "peak"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("tokens/s a GPU (≤ by FLOPs, memory, network)", justify="right")
    for run in (fitting or runs)[:SHOWN]:
        held = run.memory
        parts = (held.weights, held.gradients, held.moments, held.activations, held.buffers, held.peak)
        bounds = ", ".join(
            "–" if math.isinf(one) else count(int(one)) for one in (run.by_flops, run.by_memory, run.by_network)
        )
        table.add_row(run.layout.describe(), *map(size, parts), f"{run.expected:,.0f} ({bounds})")
    own = console.width
    whole = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.width = max(own, whole)  # a narrow terminal breaks its lines, where columns would be lost
    console.print(table)
    console.width = own
    console.print(
        f"[dim]peak: of a rank, {RESERVED:.0%} of its memory left to CUDA and NCCL; tokens/s: {EFFICIENCY:.0%} of the bound by "
        "FLOPs, which published runs reach, or the least bound[/]"
    )
    if any(run.layout.pipeline > 1 for run in (fitting or runs)[:SHOWN]):
        console.print("[dim]PP: by another engine that reads releases; pipelines have no gradients here[/]")
    if fitting:
        console.print(f"[green]fits[/] in {plural(len(fitting), 'layout')} of {len(runs)}")
        return
    console.print("[red]does not fit[/]")
    console.print(
        "Less: --gradient-checkpointing, a smaller --batch-size, --optim adamw_bnb_8bit, --train lora, more --nodes."
    )
