"""Writing a report: ``report.html``, one page that needs no network; ``chart.png``; and every number in ``report.json``."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template

from modeling_deepseek_moe import __version__
from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.eval.published import published
from modeling_deepseek_moe.eval.report import chart, explorer, svg, tables
from modeling_deepseek_moe.eval.report.figure import figures
from modeling_deepseek_moe.eval.report.gather import Pair, Run, gather, pairs
from modeling_deepseek_moe.eval.statistics import LEVEL, METHOD

FOLDER = Path(__file__).parent
PAGE, CHART, NUMBERS = "report.html", "chart.png", "report.json"


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Report the evaluations in ``folders`` into the folder ``out``; the page's path. Later ones are compared to the first.

    Raises:
        FileNotFoundError, ValueError: a folder without a finished evaluation, or a damaged one; none; or one twice.
        ImportError: matplotlib is missing, or math-verify where answers to MATH are put to the vote.
    """
    runs = gather(folders)
    compared = pairs(runs)
    drawn = figures(runs)
    image = chart.draw(drawn)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / CHART, image)
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
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    texts = "\n".join(f'<script type="text/plain" id="{name}">{text}</script>' for name, text in explorer.pieces(runs))
    several = tables.several(runs)
    comparison = tables.comparisons(compared, runs)
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(" and ".join(run.label for run in runs)),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        about="".join(f"<li>{_about(run)}</li>" for run in runs),
        scores=tables.scores(runs),
        several=f"<h3>Several outputs to a question</h3>{several}" if several else "",
        categories=tables.categories(runs),
        intervals=METHOD,
        charts=charts,
        published=tables.beside_published(runs),
        comparison=f'<section id="comparison"><h2>Comparison</h2>{comparison}</section>' if comparison else "",
        comparison_link='<a href="#comparison">Comparison</a>' if comparison else "",
        protocols=tables.protocols(runs),
        index=explorer.script_json(explorer.index(runs, compared)),
        texts=texts,
        script=script,
        version=escape(__version__),
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
    facts += [f"suite {run.evaluation.suite}", run.evaluation.date, f"{run.evaluation.seconds:,.0f} s"]
    facts += [run.evaluation.machine] if run.evaluation.machine else []
    return f"<b>{escape(run.label)}</b> {escape(' · '.join(facts))}"
