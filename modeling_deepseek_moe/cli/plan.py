"""``deepseek-moe plan``: will it run on this machine, and how fast at best, from a config alone."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from modeling_deepseek_moe.anatomy import ParameterBreakdown, describe, parameter_breakdown, read_config
from modeling_deepseek_moe.checkpoint.writer import parse_size
from modeling_deepseek_moe.cli import _plan_gpu, _plan_scale, _plan_train
from modeling_deepseek_moe.cli._console import plural, print_json, rate, size, stderr, stdout
from modeling_deepseek_moe.cli._model import SHIPPED, folder_or_tiny
from modeling_deepseek_moe.cli.inspect import parameters_dict, show_architecture
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.machine import Bandwidth, measure_disk, probe_machine
from modeling_deepseek_moe.planning import (
    DISK_EFFICIENCY,
    FROM_DISK,
    IN_MEMORY,
    MEMORY_EFFICIENCY,
    TOO_LARGE,
    Plan,
    make_plan,
)
from modeling_deepseek_moe.planning_drafts import ACCEPTANCE, Drafting

DEFAULT_CONTEXT = 8192
STYLES = {IN_MEMORY: "green", FROM_DISK: "yellow", TOO_LARGE: "red"}

ContextOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens in the cache: prompt and answer.", show_default="8192, or the model's most"),
]
DiskSpeedOption = Annotated[
    str | None,
    typer.Option(
        help="Of the disk that the weights will lie on, e.g. 3GB (a second).",
        show_default="measured if the weights are there, else 2GB",
    ),
]
CacheOption = Annotated[
    Literal["bf16", "fp8"],
    typer.Option(help="What latents are cached in (generate: cache_config={'backend': 'fp8'})."),
]
AcceptanceOption = Annotated[
    float, typer.Option(min=0, max=1, help="Of MTP drafts: the share that turns out right (generate --mtp tells).")
]


def plan(
    path: Annotated[
        Path | None, typer.Argument(help="A config.json, or a folder with one.", show_default=SHIPPED)
    ] = None,
    context: ContextOption = None,
    cache: CacheOption = "bf16",
    disk_speed: DiskSpeedOption = None,
    acceptance: AcceptanceOption = ACCEPTANCE,
    gpu: _plan_gpu.MemoryOption = None,
    gpu_speed: _plan_gpu.SpeedOption = None,
    link_speed: _plan_gpu.LinkOption = None,
    train: _plan_train.TrainOption = None,
    lora_rank: _plan_train.RankOption = None,
    batch_size: _plan_train.BatchSizeOption = None,
    seq_length: _plan_train.SeqLengthOption = None,
    optim: _plan_train.OptimOption = None,
    gradient_checkpointing: _plan_train.CheckpointingOption = False,
    train_dtype: _plan_train.TrainDtypeOption = None,
    gpus: _plan_scale.GpusOption = None,
    nodes: _plan_scale.NodesOption = None,
    fp8: _plan_scale.Fp8Option = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say whether a model will run on this machine, and how fast; or, with --train, what memory it takes to train it.

    Needs nothing but the config, so ask before the download. Memory bandwidth is measured (about a second);
    divided by the bytes that a token reads it bounds the tokens per second of a single conversation, and most of that
    is reached. Of a model that is larger than memory, experts are read from the disk: what to expect then depends
    on how many of them memory holds. "bench" measures what this predicts.

    Examples:
      [cyan]hf download deepseek-ai/DeepSeek-V3 config.json --local-dir DeepSeek-V3[/]
      [cyan]deepseek-moe plan DeepSeek-V3 --disk-speed 7GB[/]
      [cyan]deepseek-moe plan DeepSeek-V3 --context 131072 --cache fp8[/]
      [cyan]deepseek-moe plan DeepSeek-V3 --gpu 24GB --gpu-speed 930GB --link-speed 25GB[/]
      [cyan]deepseek-moe plan DeepSeek-V2-Lite --train qlora --batch-size 1 --gradient-checkpointing[/]
      [cyan]deepseek-moe plan DeepSeek-V3 --train full --gpus 8x80GB --nodes 32 --batch-size 1 --seq-length 4096[/]
      [cyan]deepseek-moe plan DeepSeek-V3 --json | jq .verdict[/]
    """
    path = _existing(folder_or_tiny(path))
    disk = None if disk_speed is None else parse_size(disk_speed)
    config = read_config(path)
    options = {"rank": lora_rank, "batch_size": batch_size, "seq_length": seq_length, "optim": optim}
    options["gradient_checkpointing"] = gradient_checkpointing
    setup = _plan_train.read_setup(config, train, train_dtype, **options)
    cluster = _plan_scale.read_cluster(gpus, nodes, train, fp8)
    if setup is not None and cache != "bf16":
        raise ValueError(f"found --cache {cache} with --train, which caches nothing, wanted one of the two")
    if cluster is not None:
        _plan_scale.plan_scale(config, setup, cluster, fp8, as_json)
    elif setup is not None:
        _plan_train.plan_training(config, setup, as_json)
    else:
        breakdown = parameter_breakdown(config)
        breakdown = breakdown.with_fp8_latents() if cache == "fp8" else breakdown
        _plan_running(path, config, breakdown, context, disk, acceptance, (gpu, gpu_speed, link_speed), as_json)


def _plan_running(
    path: Path,
    config: DeepseekMoeConfig,
    breakdown: ParameterBreakdown,
    context: int | None,
    disk: float | None,
    acceptance: float,
    gpu: tuple[str | None, str | None, str | None],
    as_json: bool,
) -> None:
    """To generate with it on this machine. ``gpu``: its memory, its speed, and that of the link."""
    with stderr().status("measuring memory bandwidth"):
        machine = probe_machine()
    measured = measure_disk(path) if disk is None else None
    speed = measured.bytes_per_second if measured else disk
    context = context or min(DEFAULT_CONTEXT, config.max_position_embeddings)
    made = make_plan(breakdown, machine, context, speed, acceptance)
    splits = _plan_gpu.splits(config, breakdown, made, *gpu)
    most = config.max_position_embeddings
    if made.context > most:
        stderr().print(f"[yellow]--context: {made.context:,} tokens are more than the model's {most:,}.[/]")
    if as_json:
        fields = {"architecture": describe(config), "parameters": parameters_dict(breakdown), "verdict": made.verdict}
        print_json(fields | asdict(made) | {"gpu_and_cpu": [asdict(split) for split in splits]})
        return
    console = stdout()
    show_architecture(describe(config), breakdown, console)
    console.print()
    _show(made, breakdown, "measured now" if measured else "assumed" if disk is None else "as given", console)
    _plan_gpu.show(splits, console)


def _existing(path: Path) -> Path:
    """
    Raises:
        ValueError: there is nothing, and the name is like that of a repository.
    """
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(
            f"{path}: found no such file or folder. If it is a repository: "
            f"hf download {path} config.json --local-dir {path.name}"
        )
    return path


def _show(made: Plan, breakdown: ParameterBreakdown, disk: str, console: Console) -> None:
    machine = made.machine
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    grid.add_row(
        "download", f"{size(made.release_bytes)} of weights" + (", MTP included" if breakdown.mtp_parameters else "")
    )
    form = " in FP8" if breakdown.fp8_latents else ""
    cache = (
        f"{made.cache_bytes_per_token:,} bytes per token{form}, {size(made.cache_bytes)} at {made.context:,} tokens"
    )
    grid.add_row("cache", cache)
    grid.add_row("memory", f"{size(machine.ram_available)} available of {size(machine.ram_bytes)}")
    grid.add_row("bandwidth", f"{_speed(machine.bandwidth)}, {plural(machine.threads, 'thread')}")
    for gpu in machine.gpus:
        grid.add_row("gpu", f"{gpu.name}, {size(gpu.free_bytes)} free of {size(gpu.memory_bytes)}")
    if machine.gpu_bandwidth:
        grid.add_row("", _speed(machine.gpu_bandwidth))
    console.print(grid)
    console.print()

    table = Table("on", "weights", box=None, header_style="dim", pad_edge=False)
    for header in ("bytes", "needed", "per token", "tokens/s (≤)"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for option in made.options:
        limit = option.tokens_per_second_limit
        table.add_row(
            "GPU" if option.device == "cuda" else "CPU",
            f"{option.weights} {option.how}",
            size(option.weight_bytes),
            size(option.needed_bytes),
            size(option.read_bytes_per_token),
            f"{rate(option.tokens_per_second or limit)} ({rate(limit)})" if limit else "",
            f"[{STYLES[option.verdict]}]{option.verdict}[/]",
        )
    console.print(table)
    console.print(
        "[dim]needed: with cache and 1.5 GB to work in; tokens/s: bandwidth / per token at most, "
        f"{MEMORY_EFFICIENCY:.0%} of that expected on a CPU, less where experts come from the disk[/]"
    )
    console.print()
    if made.budgets:
        _show_budgets(made, disk, console)
    _show_long_contexts(made, console)
    for line in made.advice:
        console.print(line)
    if made.drafting is not None:
        console.print(_mtp_line(made.drafting))


def _show_long_contexts(made: Plan, console: Console) -> None:
    """Of sparse attention, next to attention to every latent."""
    if not made.long_contexts:
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for header in ("context", "cache", "read of it", "if dense", "tokens/s", "if dense"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in made.long_contexts:
        speeds = (
            rate(speed) if speed else "" for speed in (one.sparse_tokens_per_second, one.dense_tokens_per_second)
        )
        sizes = size(one.cache_bytes), size(one.sparse_bytes), size(one.dense_bytes)
        table.add_row(f"{one.tokens:,}", *sizes, *speeds)
    console.print(table)
    console.print(
        "[dim]read of the cache for a token: the indexer's keys of all, the latents of those that it chose[/]"
    )
    console.print()


def _mtp_line(found: Drafting) -> str:
    """What a step of MTP decoding costs and gives, and from which acceptance on it pays."""
    drafts = plural(found.drafts, "draft")
    read = f"a step of {drafts} reads {size(found.verify_bytes + found.draft_bytes)} and takes {found.cost:.2f} × a token's time"
    gives = f"for {found.tokens_per_step:.2f} tokens at an acceptance of {found.acceptance:.2f}: × {found.speedup:.2f}"
    if found.break_even is None:
        ends = "It would not pay even if every draft were right"
    else:
        ends = f"It pays above an acceptance of {found.break_even:.2f}" + ("" if found.pays else ", so not here")
    return f"MTP (generate --mtp): {read}, {gives}. {ends}."


def _show_budgets(made: Plan, disk: str, console: Console) -> None:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for header in ("memory", "of it experts", "held", "from disk per token", "tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    for number, budget in enumerate(made.budgets):
        table.add_row(
            size(budget.memory_bytes) + (" (now)" if number == 0 else ""),
            size(budget.expert_bytes),
            f"{budget.hit_share:.0%}",
            size(budget.disk_bytes_per_token),
            rate(budget.tokens_per_second) if budget.tokens_per_second else "",
        )
    console.print(table)
    console.print(
        f"[dim]with a disk of {size(made.disk_bytes_per_second)}/s, {disk}, {DISK_EFFICIENCY:.0%} of it used; assuming "
        "uniform routing[/]"
    )
    console.print()


def _speed(bandwidth: Bandwidth) -> str:
    return f"{size(bandwidth.bytes_per_second)}/s, measured now (best of {bandwidth.passes} reads)"
