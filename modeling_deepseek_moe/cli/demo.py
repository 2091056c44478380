"""``deepseek-moe demo``: the package's main job from training to tokens per second, offline."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from modeling_deepseek_moe.cli._console import DEBUG

WAIT_POLICY = "OMP_WAIT_POLICY"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints and the figures.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 1,024 tokens.")] = 100,
    minutes: Annotated[float, typer.Option(min=0.05, help="Maximum training time in minutes.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and sampling.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="what is fastest", metavar="N")
    ] = None,
) -> None:
    """Fine-tune, write as FP8, load, generate and measure the tiny DeepSeek-V3 that ships: offline, in about two minutes on two cores.

    Teaches it a kind of problem that it does not know and leaves two checkpoints, OUT/fp8 and OUT/bf16, in the
    release's format, and in OUT a training that "report" draws.

    \b
    Examples:
      [cyan]deepseek-moe demo[/]
      [cyan]deepseek-moe demo --steps 200[/]
      [cyan]deepseek-moe chat --model runs/demo/fp8[/]   afterwards
      [cyan]deepseek-moe report runs/demo[/]
    """
    if WAIT_POLICY not in os.environ:
        arguments = {"out": out, "steps": steps, "minutes": minutes, "seed": seed, "threads": threads}
        raise typer.Exit(_run_in_child({name: value for name, value in arguments.items() if value is not None}))
    # Trainer's module imports every optional library that is installed; only this command pays for that, and what
    # bitsandbytes says about kernels that nothing here uses is not worth a line.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from modeling_deepseek_moe.cli import _demo_run

    _demo_run.run(out, steps=steps, seconds=60 * minutes, seed=seed, threads=threads)


def _run_in_child(arguments: dict) -> int:
    """The same command in a process whose threads sleep while they wait for each other; returns its exit code.

    By default they spin, and the small operations of a small model then take ten times as long as soon as anything
    else uses the cores. OpenMP reads its settings once, when torch is loaded, so it takes a new process.
    """
    command = [sys.executable, "-c", "from modeling_deepseek_moe.cli import main; main()"]
    command += [*(["--debug"] if DEBUG.get() else []), "demo"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    return subprocess.call(command, env=os.environ | {WAIT_POLICY: "PASSIVE"})
