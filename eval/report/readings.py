"""The part of a report that shows how answers were read: the same outputs by other readings, and what to look at."""

from collections.abc import Sequence
from html import escape

from modeling_deepseek_moe.eval.letters import MARKS, READINGS
from modeling_deepseek_moe.eval.report.gather import Run, Task

LIKE_FOR_LIKE = (
    "Measured bars of MMLU-Pro are read as its published figures were: by the authors' first pattern, and a letter by chance where "
    "it finds none. The score of the table above is by their later three stages, which find more."
)


def readings(runs: Sequence[Run]) -> str:
    """A table a task with other readings: HTML; nothing where there is none."""
    return "".join(_table(task, runs) for run in runs for task in run.tasks if task.readings)


def note(runs: Sequence[Run]) -> str:
    """The sentence of the figure with published bars, where a bar is not read as the score is."""
    return LIKE_FOR_LIKE if any(task.as_published for run in runs for task in run.tasks) else ""


def numbers(task: Task) -> dict:
    """For ``report.json``."""
    return {
        "readings": {name: vars(found) | {"about": READINGS[name].about} for name, found in task.readings.items()},
        "marks": task.marks,
    }


def _table(task: Task, runs: Sequence[Run]) -> str:
    scores = task.scores
    rows = [("The score", "as the benchmark's authors read answers", scores.score, scores.low, scores.high)]
    rows += [
        (READINGS[name].title, READINGS[name].about, found.score, found.low, found.high)
        for name, found in task.readings.items()
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(title)}</th><td>{100 * score:.1f}</td><td>{100 * low:.1f} – {100 * high:.1f}</td>'
        f"<td>{escape(about)}</td></tr>"
        for title, about, score, low, high in rows
    )
    outputs = sum(len(question.outputs) for question in task.questions)
    counts = "; ".join(f"{escape(MARKS[mark])}: {count:,} of {outputs:,}" for mark, count in task.marks.items())
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("Reading", "Score %", "95% interval", "Which"))
    caption = escape(f"{runs[task.run].label}, {task.name}")
    return (
        f'<div class="scroll" tabindex="0"><table class="words"><caption>{caption}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        + (f'<p class="note">{counts}.</p>' if counts and any(task.marks.values()) else "")
    )
