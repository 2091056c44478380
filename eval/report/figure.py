"""The bar charts of a report before they are drawn: which bars stand in which group, and how each looks.

One figure per suite, with the published models and the measured ones next to them. Runs on rows of this project get a figure
of their own: those rows are not the benchmark, so nothing published stands next to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from modeling_deepseek_moe.eval.published import published
from modeling_deepseek_moe.eval.report.gather import Run, Task
from modeling_deepseek_moe.eval.results import BENCHMARKS
from modeling_deepseek_moe.pages.plots import COLORS

SAMPLE_NOTE = (
    "These rows were written for this project in the benchmarks' formats. They are not the benchmarks: no published figure "
    "stands next to them."
)


@dataclass(frozen=True)
class Bar:
    """A bar, percent. ``low`` and ``high``: its interval; ``note``: "80 of 500" where part of the questions was asked.

    ``changed``: the run departs from the protocol; ``run``: its index, where measured.
    """

    label: str
    value: float
    color: str
    measured: bool = False
    hatch: bool = False
    low: float | None = None
    high: float | None = None
    note: str = ""
    changed: bool = False
    run: int = -1


@dataclass(frozen=True)
class Group:
    title: str
    metric: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Figure:
    title: str
    y_label: str
    groups: tuple[Group, ...]
    note: str = ""

    @property
    def is_measured(self) -> bool:
        return any(bar.measured for group in self.groups for bar in group.bars)

    @property
    def legend(self) -> list[Bar]:
        """The first bar of each model: the published ones, then the measured in the order of their runs."""
        first = {}
        for bar in (bar for group in self.groups for bar in group.bars):
            first.setdefault((bar.label, bar.measured), bar)
        return sorted(first.values(), key=lambda bar: bar.run)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Those with something to show, what was measured first: an unpublished suite, of which only sample rows were run, has none."""
    tasks = [task for run in runs for task in run.tasks]
    found = []
    for suite in dict.fromkeys(run.evaluation.suite for run in runs):
        real = [task for task in tasks if runs[task.run].evaluation.suite == suite and not task.sample]
        found.append(_of_suite(suite, real, runs))
    found.append(_of_samples([task for task in tasks if task.sample], runs))
    return sorted((figure for figure in found if figure.groups), key=lambda figure: not figure.is_measured)


def run_color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def _of_suite(suite: str, tasks: Sequence[Task], runs: Sequence[Run]) -> Figure:
    table = published(suite)
    order = list(table.metrics) if table else []
    order += [name for name in dict.fromkeys(task.facts.benchmark for task in tasks) if name not in order]
    groups = []
    for benchmark in order:
        bars = [
            Bar(model.name, model.scores[benchmark], model.color, hatch=model.hatch)
            for model in (table.models if table else ())
            if model.figure and benchmark in model.scores
        ]
        bars += _measured([task for task in tasks if task.facts.benchmark == benchmark], runs)
        metric = table.metrics.get(benchmark, "") if table else ""
        groups.append(Group(BENCHMARKS.get(benchmark, benchmark), metric, tuple(bars)))
    shown = any(bar.measured for group in groups for bar in group.bars)
    if table is None:
        title = f"{suite}: nothing was published to compare it with"
    else:
        title = f"{suite}: compared with {table.title}" if shown else f"Published figures: {table.title}"
    note = "" if shown else "Nothing was measured on the benchmarks' own questions: published figures only."
    kept = tuple(group for group in groups if group.bars)
    return Figure(title, table.y_label if table else "Score (%)", kept, note)


def _of_samples(tasks: Sequence[Task], runs: Sequence[Run]) -> Figure:
    groups = []
    for benchmark in dict.fromkeys(task.facts.benchmark for task in tasks):
        bars = _measured([task for task in tasks if task.facts.benchmark == benchmark], runs)
        groups.append(Group(f"{BENCHMARKS.get(benchmark, benchmark)} format", "sample rows", tuple(bars)))
    kept = tuple(group for group in groups if group.bars)
    return Figure("Sample rows of this project", "Right answers (%)", kept, SAMPLE_NOTE)


def _measured(tasks: Sequence[Task], runs: Sequence[Run]) -> list[Bar]:
    bars = []
    for task in tasks:
        if task.headline is None:
            continue
        value, low, high = task.headline
        note = f"{len(task.questions):,} of {task.rows:,}" if task.partial else ""
        bars.append(
            Bar(
                runs[task.run].label,
                value,
                run_color(task.run),
                measured=True,
                low=low,
                high=high,
                note=note,
                changed=bool(task.facts.changed),
                run=task.run,
            )
        )
    return bars
