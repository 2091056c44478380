"""``deepseek-moe demo``: the package's main job from text to tokens a second, offline, in a few minutes."""

import logging
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints and the figures.")] = Path("runs/demo"),
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to train on.", show_default="the demo's own text")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 2,048 tokens.")] = 200,
    minutes: Annotated[float, typer.Option(min=0.05, help="Stop training after so long at the latest.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and sampling.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="what is fastest", metavar="N")
    ] = None,
) -> None:
    """Train, write as FP8, load, generate and measure a small DeepSeek-V3: offline, in about four minutes on two cores.

    Leaves two checkpoints behind, OUT/fp8 and OUT/bf16, in the release's format. Without --text it uses
    ../shared/data/tinyshakespeare.txt where there is one, and else a text of its own.

    \b
    Examples:
      [cyan]deepseek-moe demo[/]
      [cyan]deepseek-moe demo --text my-notes.txt --steps 100[/]
      [cyan]deepseek-moe chat --model runs/demo/fp8[/]   afterwards
    """
    # Trainer's module imports every optional library that is installed; only this command pays for that, and what
    # bitsandbytes says about kernels that nothing here uses is not worth a line.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from modeling_deepseek_moe.cli import _demo_run

    _demo_run.run(out, text, steps=steps, seconds=60 * minutes, seed=seed, threads=threads)
