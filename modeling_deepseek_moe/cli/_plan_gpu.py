"""``deepseek-moe plan --gpu``: a GPU that is smaller than the model, with the experts in main memory."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modeling_deepseek_moe.anatomy import ParameterBreakdown
from modeling_deepseek_moe.checkpoint.writer import parse_size
from modeling_deepseek_moe.cli._console import rate, size
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.hybrid.prediction import GPU_EXAMPLE, LINK_EXAMPLE, Given, Split, predict
from modeling_deepseek_moe.planning import MEMORY_EFFICIENCY, Plan

MemoryOption = Annotated[
    str | None,
    typer.Option(help="Of a GPU that takes all but routed experts, e.g. 24GB.", show_default="that of the GPU here"),
]
SpeedOption = Annotated[
    str | None,
    typer.Option(help="Of its memory, e.g. 1TB (a second).", show_default=f"measured, else {size(GPU_EXAMPLE)}"),
]
LinkOption = Annotated[
    str | None, typer.Option(help="Between both memories, e.g. 25GB (a second).", show_default=size(LINK_EXAMPLE))
]


def splits(
    config: DeepseekMoeConfig,
    breakdown: ParameterBreakdown,
    made: Plan,
    gpu: str | None,
    gpu_speed: str | None,
    link_speed: str | None,
) -> tuple[Split, ...]:
    """None without a GPU, given or here.

    Raises:
        ValueError: a GPU's speed without a GPU, or a GPU that what is no routed expert does not fit.
    """
    machine = made.machine
    memory = parse_size(gpu) if gpu is not None else machine.gpus[0].free_bytes if machine.gpus else None
    if memory is None:
        if gpu_speed is not None or link_speed is not None:
            raise ValueError("--gpu-speed, --link-speed: found no GPU here, wanted its memory too: --gpu 24GB")
        return ()
    if machine.bandwidth is None:
        return ()
    measured = machine.gpu_bandwidth.bytes_per_second if machine.gpu_bandwidth and gpu is None else GPU_EXAMPLE
    given = Given(
        memory,
        machine.bandwidth.bytes_per_second,
        parse_size(gpu_speed) if gpu_speed is not None else measured,
        parse_size(link_speed) if link_speed is not None else LINK_EXAMPLE,
    )
    found = predict(breakdown, config, made.context, given)
    if not found and gpu is not None:
        raise ValueError(f"--gpu {gpu}: found too little for what is no routed expert, with cache and workspace")
    return found


def show(found: tuple[Split, ...], console: Console) -> None:
    if not found:
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for header in ("experts on the GPU", "GPU memory", "main memory", "GPU ms", "CPU ms", "crossing ms", "tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    for split in found:
        times = (f"{1000 * seconds:.1f}" for seconds in (split.gpu_seconds, split.cpu_seconds, split.link_seconds))
        sizes = size(split.gpu_bytes), size(split.cpu_bytes)
        table.add_row(f"{split.held_share:.0%}", *sizes, *times, rate(split.tokens_per_second))
    console.print(table)
    console.print(
        f"[dim]experts in main memory, computed by the CPU, the rest on the GPU; {MEMORY_EFFICIENCY:.0%} of each bandwidth, "
        "uniform routing; not measured on a GPU[/]"
    )
    console.print()
