"""``deepseek-moe report``: a training's curves and expert loads, or the scores of evaluations, as a page."""

import json
from pathlib import Path
from typing import Annotated

import typer

from modeling_deepseek_moe.cli._console import print_json, stdout


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="The output folder of a training or one of its checkpoints; or those of one or more evaluations.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the report.", show_default="FOLDER/report")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Report a training or an evaluation: one HTML page that needs no network, and its figures as JSON.

    Of a training, losses and expert loads, from trainer_state.json and expert_load.jsonl: heat maps show the load of each expert
    as a multiple of the mean, by layer and over time. Of evaluations, scores with intervals next to the published ones (the chart as
    chart.svg too), and every question with its answers; of two or more, where they differ and whether that can be chance.

    \b
    Examples:
      [cyan]deepseek-moe report runs/sft[/]
      [cyan]deepseek-moe report runs/sft/checkpoint-500 --out drawings --json[/]
      [cyan]deepseek-moe report runs/eval-before runs/eval-after --out runs/comparison[/]
    """
    out = out or folders[0] / "report"
    if any((folder / "evaluation.json").is_file() for folder in folders):
        from modeling_deepseek_moe.eval.report import write_report

        page = write_report(folders, out)
        figures = json.loads((out / "report.json").read_text(encoding="utf-8"))
    elif len(folders) > 1:
        raise ValueError(f"{folders[0]}: found no evaluation.json; only evaluations are reported together")
    else:
        from modeling_deepseek_moe.cli._report_draw import draw

        page, figures = draw(folders[0], out)
    if as_json:
        print_json(figures)
    else:
        stdout().print(f"wrote {page}", soft_wrap=True, markup=False)
