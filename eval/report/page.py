"""Writing a report: ``report.html``, one page that needs no network; ``chart.svg``; and every number in ``report.json``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

from modeling_deepseek_moe import __version__
from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.eval.published import published
from modeling_deepseek_moe.eval.report import explorer, readings, svg, tables
from modeling_deepseek_moe.eval.report.figure import figures
from modeling_deepseek_moe.eval.report.gather import Pair, Run, gather, pairs
from modeling_deepseek_moe.eval.statistics import LEVEL, METHOD
from modeling_deepseek_moe.pages.document import document
from modeling_deepseek_moe.pages.texts import label

FOLDER = Path(__file__).parent
PAGE, CHART, NUMBERS = "report.html", "chart.svg", "report.json"


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Report the evaluations in ``folders`` into the folder ``out``; the page's path. Later ones are compared to the first.

    Raises:
        FileNotFoundError, ValueError: a folder without a finished evaluation, or a damaged one; none; or one twice.
        ImportError: math-verify is missing, and answers to MATH are put to the vote.
    """
    runs = gather(folders)
    compared = pairs(runs)
    drawn = figures(runs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / CHART, svg.image(drawn))
    write_file(out / NUMBERS, json.dumps(numbers(runs, compared), indent=1, default=str) + "\n")
    write_file(out / PAGE, page(runs, compared, svg.draw(drawn)))
    return out / PAGE


def numbers(runs: Sequence[Run], compared: Sequence[Pair]) -> dict:
    """``report.json``: scores, comparisons and published figures, with all that it takes to run the same again."""
    suites = dict.fromkeys(run.evaluation.suite for run in runs)
    return {
        "format": 1,
        "version": __version__,
        "interval": {"level": LEVEL, "method": METHOD, "over": "questions"},
        "runs": [_run_numbers(run) for run in runs],
        "comparisons": [
            {
                "benchmark": pair.benchmark,
                "runs": [runs[run].label for run in pair.runs],
                "refused": pair.refused or None,
                "unlike": pair.unlike,
                "found": pair.found and asdict(pair.found),
            }
            for pair in compared
        ],
        "published": {suite: asdict(table) for suite in suites if (table := published(suite))},
    }


def page(runs: Sequence[Run], compared: Sequence[Pair], charts: str) -> str:
    """``charts``: the SVG figures."""
    texts = "\n".join(f'<script type="text/plain" id="{name}">{text}</script>' for name, text in explorer.pieces(runs))
    index = explorer.script_json(explorer.index(runs, compared))
    several = tables.several(runs)
    comparison = tables.comparisons(compared, runs)
    body = Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        scores=tables.scores(runs),
        stock=tables.stock(runs),
        readings=f"<h3>The same answers, read otherwise</h3>{others}" if (others := readings.readings(runs)) else "",
        reading_note=f'<p class="note">{escape(note)}</p>' if (note := readings.note(runs)) else "",
        several=f"<h3>Several outputs to a question</h3>{several}" if several else "",
        categories=tables.categories(runs),
        intervals=METHOD,
        charts=charts,
        published=tables.beside_published(runs),
        comparison=f'<section id="comparison"><h2>Comparison</h2>{comparison}</section>' if comparison else "",
        protocols=tables.protocols(runs),
    )
    links = [("scores", "Scores"), ("figure", "Figures"), ("protocol", "Protocol"), ("questions", "Questions")]
    if comparison:
        links.insert(2, ("comparison", "Comparison"))
    return document(
        "Evaluation",
        " and ".join(run.label for run in runs),
        about=map(_about, runs),
        links=links,
        body=body,
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        data=f'<script type="application/json" id="index">{index}</script>\n{texts}',
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
    )


def _run_numbers(run: Run) -> dict:
    return {
        "label": run.label,
        "folder": str(run.folder),
        "evaluation": asdict(run.evaluation),
        "tasks": {
            task.facts.task: {
                "name": task.name,
                "rows": task.rows,
                "partial": task.partial,
                "sample": task.sample,
                **asdict(task.scores),
                **readings.numbers(task),
            }
            for task in run.tasks
        },
    }


def _about(run: Run) -> str:
    model = run.evaluation.model
    quantization = model.get("quantization") or ""
    if isinstance(quantization, dict):
        quantization = str(quantization.get("quant_method", "quantized"))
    facts = [str(fact) for fact in (model.get("dtype"), quantization) if fact]
    if isinstance(model.get("parameters"), int):
        facts.insert(0, f"{model['parameters']:,} parameters")
    facts += [f"suite {run.evaluation.suite}", _when(run.evaluation.date), f"{run.evaluation.seconds:,.0f} s"]
    facts += [run.evaluation.machine] if run.evaluation.machine else []
    return f"<b>{label(run.label)}</b> {label(' · '.join(facts), 300)}"


def _when(date: str) -> str:
    """``2026-11-24 12:00 UTC``; what is no such date as it is."""
    try:
        return f"{datetime.fromisoformat(date):%Y-%m-%d %H:%M %Z}"
    except ValueError:
        return date
