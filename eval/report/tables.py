"""The tables of a report as HTML. Every text goes through ``label`` or ``words``: labels and settings are not ours."""

import json
from collections.abc import Sequence

from modeling_deepseek_moe.eval.published import published
from modeling_deepseek_moe.eval.report.figure import run_color
from modeling_deepseek_moe.eval.report.gather import Pair, Run, Task
from modeling_deepseek_moe.eval.results import BENCHMARKS
from modeling_deepseek_moe.eval.statistics import LEVEL
from modeling_deepseek_moe.pages.document import table as _table
from modeling_deepseek_moe.pages.texts import bounded, label, plain, words

NONE = '<span class="none">–</span>'
SCORE_HEADS = ("Model", "Task", "Questions", "Answers each", "Score %", "95% interval", "Stock lm-eval %")
SCORE_HEADS += ("No answer %", "Truncated %", "Tokens")
# Benchmark -> what lm-eval's own task reads of an answer: why its score may be far below, or nothing at all.
STOCK_READS = {
    "mmlu_pro": "“answer is (X)” and no other wording, so a letter in \\boxed{} or after “Answer:” is lost",
    "math500": "what stands between the first and the last dollar sign, so a \\boxed{} answer without them is lost",
    "math": "what stands between the first and the last dollar sign, so a \\boxed{} answer without them is lost",
    "aime24": "the answer as a text that has to be equal",
    "gpqa_diamond": "the last letter in round brackets",
}
FAR = 0.1  # of the score between the two readings: worth a word


def scores(runs: Sequence[Run]) -> str:
    rows = [_score_row(task, runs) for run in runs for task in run.tasks]
    return _table(SCORE_HEADS, rows, kind="named")


def stock(runs: Sequence[Run]) -> str:
    """Why lm-eval's own task finds far fewer right answers, for the tasks where it does; nothing where there is none."""
    notes = []
    for task in (task for run in runs for task in run.tasks):
        one, reads = task.scores, STOCK_READS.get(task.facts.benchmark)
        if reads and one.stock is not None and one.score is not None and one.score - one.stock > FAR:
            made = one.n * (one.k or 1)
            notes.append(
                f"<li>{_key(task.run, runs)}, {label(task.name)}: of {made:,} answers, {made * one.score:,.0f} are right here and "
                f"{made * one.stock:,.0f} by lm-eval's own task, which reads {words(reads)}.</li>"
            )
    return f'<ul class="marks">{"".join(notes)}</ul>' if notes else ""


def several(runs: Sequence[Run]) -> str:
    """pass@k and maj@k of the tasks with more than one output a question; nothing where there is none."""
    parts = []
    for task in (task for run in runs for task in run.tasks):
        if not task.scores.pass_at:
            continue
        steps = list(task.scores.pass_at)
        rows = [
            ["pass@k %", *(_percent(task.scores.pass_at[k]) for k in steps)],
        ]
        if task.scores.majority_at:
            rows.append(["maj@k %", *(_percent(task.scores.majority_at.get(k)) for k in steps)])
        caption = f"{runs[task.run].label}, {task.name}"
        parts.append(_table(["", *(f"k = {k}" for k in steps)], rows, caption=caption))
    return "".join(parts)


def categories(runs: Sequence[Run]) -> str:
    parts = []
    for task in (task for run in runs for task in run.tasks if task.scores.categories):
        rows = [
            [label(name) if name else NONE, f"{c['n']:,}", _percent(c["score"]), _range(c["low"], c["high"])]
            for name, c in task.scores.categories.items()
        ]
        table = _table(("Category", "Questions", "Score %", "95% interval"), rows)
        title = label(f"{runs[task.run].label}, {task.name}")
        parts.append(
            f"<details><summary>{title}: {len(rows)} {'category' if len(rows) == 1 else 'categories'}</summary>{table}</details>"
        )
    return "".join(parts)


def beside_published(runs: Sequence[Run]) -> str:
    """A table a suite: benchmarks down, measured runs and then published models across."""
    return "".join(_published(suite, runs) for suite in dict.fromkeys(run.evaluation.suite for run in runs))


def protocols(runs: Sequence[Run]) -> str:
    return "".join(_protocol(run) for run in runs)


def comparisons(pairs: Sequence[Pair], runs: Sequence[Run]) -> str:
    shown = [pair for pair in pairs if pair.found]
    return "".join(_comparison(pair, shown.index(pair) if pair.found else None, runs) for pair in pairs)


def _score_row(task: Task, runs: Sequence[Run]) -> list[str]:
    scores = task.scores
    asked = f"{scores.n:,}" + (f' <span class="tag part">of {task.rows:,}</span>' if task.partial else "")
    sample = ' <span class="tag sample">sample rows</span>' if task.sample else ""
    changed = ' <span class="tag">changed *</span>' if task.facts.changed else ""
    return [
        _key(task.run, runs),
        f"{label(task.name)}{sample}{changed}<small>{label(task.facts.task)}</small>",
        asked,
        NONE if scores.k is None else str(scores.k),
        f"<b>{_percent(scores.score)}</b>",
        _range(scores.low, scores.high),
        _percent(scores.stock),
        _percent(scores.no_answer),
        _percent(scores.truncated),
        NONE if scores.tokens is None else f"{scores.tokens:,.0f}",
    ]


def _published(suite: str, runs: Sequence[Run]) -> str:
    table = published(suite)
    if table is None:
        return f'<p class="note">Nothing was published for the suite {label(suite)}.</p>'
    ours = [run for run in runs if run.evaluation.suite == suite]
    number = {id(run): i for i, run in enumerate(runs)}
    heads = [
        "Benchmark",
        *(f"{bounded(run.label, 60)} (measured)" for run in ours),
        *(model.name for model in table.models),
    ]
    rows = []
    for benchmark, metric in table.metrics.items():
        row = [f"{label(BENCHMARKS[benchmark])}<small>{label(metric)}</small>"]
        row += [_measured_cell(run, benchmark, run_color(number[id(run)])) for run in ours]
        row += [f"{model.scores[benchmark]:.1f}" if benchmark in model.scores else NONE for model in table.models]
        rows.append(row)
    notes = "".join(f"<li>{words(note)}</li>" for note in table.notes)
    source = f'<li>Source: {words(table.source)} (<a href="{plain(table.url, 400)}">{label(table.url)}</a>)</li>'
    whole = _table(heads, rows, caption=table.title) + f'<ul class="marks">{notes}{source}</ul>'
    if any(not task.sample and task.headline is not None for run in ours for task in run.tasks):
        return whole
    return f"<details><summary>{label(table.title)} as a table</summary>{whole}</details>"


def _measured_cell(run: Run, benchmark: str, color: str) -> str:
    cells = []
    for task in (task for task in run.tasks if task.facts.benchmark == benchmark):
        if task.sample:
            cells.append('<span class="none">sample rows only</span>')
        elif task.headline is not None:
            value, low, high = task.headline
            interval = "" if low is None else f"<small>{low:.1f} – {high:.1f}</small>"
            part = f'<small class="part">{task.scores.n:,} of {task.rows:,}</small>' if task.partial else ""
            part += "<small>read as published</small>" if task.as_published else ""
            mark = "*" if task.facts.changed else ""
            cells.append(f'<b style="--run:{color}" class="run">{value:.1f}{mark}</b>{interval}{part}')
    return "".join(cells) or '<span class="none">not measured</span>'


def _protocol(run: Run) -> str:
    evaluation = run.evaluation
    name = label(str(evaluation.protocol.get("name", evaluation.suite)))
    about = words(str(evaluation.protocol.get("about", "")))
    changed = [
        f"<li><b>{label(task.name)}</b>: {words(what)}</li>" for task in run.tasks for what in task.facts.changed
    ]
    departs = (
        f'<ul class="changed">{"".join(changed)}</ul>' if changed else "<p>Nothing departs from the protocol.</p>"
    )
    fields = evaluation.protocol.get("fields", {})
    rows = [
        [
            f"<code>{label(field)}</code>",
            f"<code>{words(_text(entry.get('value')))}</code>",
            _status(str(entry.get("status", "assumed"))),
            words(str(entry.get("source", ""))),
        ]
        for field, entry in fields.items()
    ]
    count = sum(entry.get("status") == "documented" for entry in fields.values())
    table = _table(("Field", "Value", "Status", "Source or reason"), rows, kind="words")
    return (
        f"<h3>{label(run.label)}: protocol {name}</h3><p>{about}</p><h4>Deviations from the protocol</h4>{departs}"
        f"<details><summary>{len(fields)} fields: {count} documented, {len(fields) - count} assumed</summary>{table}"
        f"</details><details><summary>To run it again</summary>{_facts(run)}</details>"
    )


def _facts(run: Run) -> str:
    evaluation = run.evaluation
    facts = {"command": evaluation.command, "date": evaluation.date, "seconds": evaluation.seconds}
    facts |= {"machine": evaluation.machine, "folder": str(run.folder)}
    facts |= {f"model.{name}": value for name, value in evaluation.model.items()}
    facts |= {f"version.{name}": value for name, value in evaluation.versions.items()}
    facts |= {f"seed.{name}": value for name, value in evaluation.seeds.items()}
    for task in run.tasks:
        facts |= {f"{task.facts.task}.data.{name}": value for name, value in task.facts.data.items()}
        facts |= {f"{task.facts.task}.{name}": value for name, value in task.facts.settings.items()}
    rows = [[f"<code>{label(name)}</code>", f"<code>{words(_text(value))}</code>"] for name, value in facts.items()]
    return _table(("Field", "Value"), rows, kind="words")


def _comparison(pair: Pair, shown: int | None, runs: Sequence[Run]) -> str:
    first, second = (runs[run].label for run in pair.runs)
    names = BENCHMARKS.get(pair.benchmark, pair.benchmark)
    title = f"<h3>{label(names)}: {label(second)} against {label(first)}</h3>"
    unlike = "".join(f"<li>{words(what)}</li>" for what in pair.unlike)
    unlike = f'<p>Besides the model, these differ:</p><ul class="changed">{unlike}</ul>' if unlike else ""
    if pair.found is None:
        return f'{title}<p class="note">Not compared: {words(pair.refused)}.</p>{unlike}'
    found = pair.found
    p_value = NONE if found.p_value is None else _p_value(found.p_value)
    row = [
        f"{found.n:,}",
        *(_percent(score) for score in (found.first, found.second)),
        f"<b>{100 * found.difference:+.1f}</b>",
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
        p_value,
        f"{len(found.first_better):,}",
        f"{len(found.second_better):,}",
    ]
    heads = ("Questions of both", f"{first} %", f"{second} %", "Difference", f"{LEVEL:.0%} interval", "McNemar p")
    heads += (f"{first} better on", f"{second} better on")
    clear = found.low > 0 or found.high < 0
    verdict = "The interval excludes zero." if clear else "The interval includes zero: no difference is shown."
    left = [
        f"{count:,} only in {name}"
        for count, name in ((found.only_first, first), (found.only_second, second))
        if count
    ]
    left = f" Left out: {label(', '.join(left))}." if left else ""
    differing = len(found.first_better) + len(found.second_better)
    button = f'<button type="button" data-pair="{shown}">Show the {differing:,} questions where they differ</button>'
    table = _table(heads, [row])
    return f"{title}{table}<p>{verdict}{left}</p>{button if differing else ''}{unlike}"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _status(status: str) -> str:
    return f'<span class="tag {"documented" if status == "documented" else "assumed"}">{label(status)}</span>'


def _key(run: int, runs: Sequence[Run]) -> str:
    return f'<span class="key" style="--run:{run_color(run)}">{label(runs[run].label)}</span>'


def _text(value: object) -> str:
    return value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False, default=str)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def _range(low: float | None, high: float | None) -> str:
    return NONE if low is None else f"{100 * low:.1f} – {100 * high:.1f}"
