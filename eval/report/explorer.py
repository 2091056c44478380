"""The questions of a report as the page's script reads them: a short index, and the long texts in compressed pieces.

12,032 questions with their prompts and outputs are some 100 MB. The index holds what lists, filters and quick search need;
a piece of `PIECE` questions is gzip in base64, which the page unpacks when one of them is opened or searched. So the page
opens at once, and nothing a model wrote is ever in its markup.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from modeling_deepseek_moe.eval.report.gather import Pair, Run, Task
from modeling_deepseek_moe.eval.results import Output, Question
from modeling_deepseek_moe.pages.texts import bounded

PIECE = 64
ANSWERS = 8  # distinct answers of a question that the index keeps
ANSWER = 400  # characters of each: a list is searched by it, the whole is with the output
NO_ANSWER, TRUNCATED = 1, 2  # flags of a row: at least one output is so
MARK_FLAGS = {"several": 4, "word": 8, "chance": 16}  # likewise


def script_json(value: object) -> str:
    """JSON that may stand in a ``<script>``: there, only ``<`` can end the element or start a comment."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def index(runs: Sequence[Run], pairs: Sequence[Pair]) -> dict:
    """The index. A row is ``[id, category number, question, gold, answers, right outputs, outputs, flags]``."""
    tasks = [{"label": bounded(run.label), "tasks": [_task(task) for task in run.tasks]} for run in runs]
    return {"piece": PIECE, "runs": tasks, "pairs": [_pair(pair, runs) for pair in pairs if pair.found]}


def pieces(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Element id ``t-<run>-<task>-<piece>``, and base64 of gzip of a JSON list of prompts and outputs."""
    for i, run in enumerate(runs):
        for j, task in enumerate(run.tasks):
            for number, start in enumerate(range(0, len(task.questions), PIECE)):
                texts = [_texts(question) for question in task.questions[start : start + PIECE]]
                packed = gzip.compress(json.dumps(texts).encode(), compresslevel=6, mtime=0)
                yield f"t-{i}-{j}-{number}", base64.b64encode(packed).decode()


def _task(task: Task) -> dict:
    categories = sorted({question.category for question in task.questions})
    numbers = {name: number for number, name in enumerate(categories)}
    rows = [_row(question, numbers) for question in task.questions]
    suffix = " (sample rows)" if task.sample else ""
    return {
        "task": task.facts.task,
        "name": task.name + suffix,
        "categories": [bounded(name) for name in categories],
        "rows": rows,
    }


def _row(question: Question, numbers: dict[str, int]) -> list:
    outputs = question.outputs
    answers = list(dict.fromkeys(output.answer[:ANSWER] for output in outputs if output.answer is not None))[:ANSWERS]
    flags = NO_ANSWER * any(output.answer is None for output in outputs)
    flags |= TRUNCATED * any(bool(output.truncated) for output in outputs)
    for mark, flag in MARK_FLAGS.items():
        flags |= flag * any(mark in output.marks for output in outputs)
    right = sum(output.right for output in outputs)
    category = numbers[question.category]
    return [question.id, category, question.question, question.gold, answers, right, len(outputs), flags]


def _texts(question: Question) -> dict:
    return {"prompt": question.prompt, "outputs": [_output(output) for output in question.outputs]}


def _output(output: Output) -> dict:
    values = {name: value for name, value in asdict(output).items() if value is not None and value not in ({}, ())}
    if output.scores:
        values["scores"] = {option: f"{score:.3f}" for option, score in output.scores.items()}  # -inf is no JSON
    return values


def _pair(pair: Pair, runs: Sequence[Run]) -> dict:
    task = runs[pair.runs[0]].tasks[pair.tasks[0]]
    rows = {question.id: row for row, question in enumerate(task.questions)}
    return {
        "runs": pair.runs,
        "tasks": pair.tasks,
        "first": [rows[name] for name in pair.found.first_better],
        "second": [rows[name] for name in pair.found.second_better],
    }
