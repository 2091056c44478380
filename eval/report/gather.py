"""What a report is made from: evaluations read from their folders, with scores and comparisons."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling_deepseek_moe.eval.benchmarks import SCORERS
from modeling_deepseek_moe.eval.data import SAMPLE
from modeling_deepseek_moe.eval.letters import MARKS, READINGS
from modeling_deepseek_moe.eval.published import SIZES
from modeling_deepseek_moe.eval.results import (
    BENCHMARKS,
    Evaluation,
    Question,
    TaskRun,
    read_evaluation,
    read_questions,
)
from modeling_deepseek_moe.eval.statistics import Comparison, Scores, compare, interval, summarise


@dataclass(frozen=True)
class Reading:
    """A score of other readings with its interval, shares of one."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Task:
    """A task of a run, scored.

    Args:
        run: index of the run that it belongs to.
        rows: questions in the whole benchmark, which a local folder may hold in part; of sample rows, all there are.
        partial: fewer questions were asked than that.
        sample: asked on rows of this project, so that its score is not the benchmark's.
        readings: scores of the same outputs read otherwise, by the names of `letters.READINGS`.
        marks: of `letters.MARKS`, how many outputs have it.
    """

    run: int
    facts: TaskRun
    questions: Sequence[Question]
    scores: Scores
    readings: dict[str, Reading] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return BENCHMARKS.get(self.facts.benchmark, self.facts.benchmark)

    @property
    def rows(self) -> int:
        return self.facts.rows if self.sample else max(self.facts.rows, SIZES.get(self.facts.benchmark, 0))

    @property
    def partial(self) -> bool:
        return len(self.questions) < self.rows

    @property
    def sample(self) -> bool:
        return self.facts.data.get("source") == SAMPLE

    @property
    def as_published(self) -> Reading | None:
        """The score read as the published figures were, where that is not the reading of the score itself."""
        return None if self.sample else self.readings.get("published")

    @property
    def headline(self) -> tuple[float, float | None, float | None] | None:
        """Value and interval on the published scale, percent; None where nothing was measured on that scale.

        Codeforces is published as a percentile of competitors, which no share of solved problems is: it is the harness's
        ``percentile`` or nothing, and has no interval.
        """
        if self.facts.benchmark == "codeforces":
            value = self.facts.harness.get("percentile")
            return None if value is None else (float(value), None, None)
        if self.scores.score is None:
            return None
        if self.as_published is not None:
            like = self.as_published
            return 100 * like.score, 100 * like.low, 100 * like.high
        return 100 * self.scores.score, 100 * self.scores.low, 100 * self.scores.high


@dataclass(frozen=True)
class Run:
    """An evaluation; ``label`` names its model, apart from every other run's in the report."""

    folder: Path
    label: str
    evaluation: Evaluation
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Pair:
    """A benchmark that two runs, by index, both have.

    Args:
        tasks: the index of the task in each run.
        found: None where the two cannot be compared, and ``refused`` says why.
        unlike: what differs between the two besides the model.
    """

    benchmark: str
    runs: tuple[int, int]
    tasks: tuple[int, int]
    found: Comparison | None
    refused: str
    unlike: tuple[str, ...]


def gather(folders: Sequence[Path]) -> list[Run]:
    """
    Raises:
        FileNotFoundError, ValueError: a folder without a finished evaluation, or a damaged one; none; or one twice.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("found no folder, wanted that of at least one finished evaluation")
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise ValueError(f"{folder}: found twice, wanted each evaluation once")
    evaluations = [read_evaluation(folder) for folder in folders]
    labels = _labels(folders, evaluations)
    return [
        Run(folder, label, evaluation, tuple(_task(i, folder, facts) for facts in evaluation.tasks))
        for i, (folder, label, evaluation) in enumerate(zip(folders, labels, evaluations, strict=True))
    ]


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """The first run against each other one, by benchmark."""
    found = []
    for i, other in enumerate(runs[1:], 1):
        for j, task in enumerate(runs[0].tasks):
            for k, theirs in enumerate(other.tasks):
                if task.facts.benchmark == theirs.facts.benchmark:
                    found.append(_pair((0, i), (j, k), runs))
    return found


def _task(run: int, folder: Path, facts: TaskRun) -> Task:
    questions = read_questions(folder, facts.task)
    try:
        scores = summarise(questions, equal=_equal(facts.benchmark))
    except ValueError as error:
        raise ValueError(f"{folder}: {facts.task}: {error}") from None
    outputs = [output for question in questions for output in question.outputs]
    counts = {mark: sum(mark in output.marks for output in outputs) for mark in MARKS}
    marks = {mark: count for mark, count in counts.items() if any(output.readings for output in outputs)}
    return Task(run, facts, questions, scores, _readings(questions), marks)


def _readings(questions: Sequence[Question]) -> dict[str, Reading]:
    """Of those readings that every output has."""
    found = {}
    for name in READINGS:
        if not questions or any(name not in output.readings for question in questions for output in question.outputs):
            continue
        scores = np.array([np.mean([o.readings[name]["right"] for o in question.outputs]) for question in questions])
        found[name] = Reading(float(scores.mean()), *interval(scores))
    return found


def _equal(benchmark: str) -> Callable[[str, str], bool]:
    return SCORERS[benchmark].equal if benchmark in SCORERS else str.__eq__


def _labels(folders: Sequence[Path], evaluations: Sequence[Evaluation]) -> list[str]:
    labels = [
        str(evaluation.model.get("label") or folder.name)
        for folder, evaluation in zip(folders, evaluations, strict=True)
    ]
    for make in (lambda i: folders[i].name, lambda i: str(i + 1)):
        shared = {label for label, count in Counter(labels).items() if count > 1}
        labels = [f"{label} ({make(i)})" if label in shared else label for i, label in enumerate(labels)]
    return labels


def _pair(runs: tuple[int, int], tasks: tuple[int, int], every: Sequence[Run]) -> Pair:
    first, second = (every[run].tasks[task] for run, task in zip(runs, tasks, strict=True))
    found, refused = None, ""
    try:
        found = compare(first.questions, second.questions)
    except ValueError as error:
        refused = str(error)
    settings = first.facts.settings, second.facts.settings
    unlike = [
        f"{name}: {settings[0].get(name)!r} and {settings[1].get(name)!r}"
        for name in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(name) != settings[1].get(name)
    ]
    suites = [every[run].evaluation.suite for run in runs]
    if suites[0] != suites[1]:
        unlike.insert(0, f"suite: {suites[0]} and {suites[1]}")
    hashes = [task.facts.data.get("sha256") for task in (first, second)]
    if hashes[0] != hashes[1]:
        unlike.append("the data files differ")
    return Pair(first.facts.benchmark, runs, tasks, found, refused, tuple(unlike))
