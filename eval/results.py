"""What an evaluation leaves on disk, and reading it back: ``evaluation.json`` and ``samples/<task>.jsonl``.

The samples hold every prompt, output and verdict, one question a line; scores and intervals are computed from them, never
stored next to them. ``evaluation.json`` holds what it takes to run the same again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from urllib.parse import quote

from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.checkpoint.journal import to_json

FORMAT = 1
EVALUATION_FILE = "evaluation.json"
SAMPLES_FOLDER = "samples"
JOURNAL_FILE = "journal.jsonl"
LONGEST_NAME = 150  # of a task in a file's name
EVALUATION_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "suite": str,
    "protocol": dict,
    "tasks": list,
    "versions": dict,
    "seeds": dict,
    "date": str,
}
EVALUATION_TYPES |= {"seconds": (int, float), "command": str, "machine": str}
QUESTION_TYPES: dict[str, type | tuple[type, ...]] = {"id": (str, int), "question": str, "prompt": str, "gold": str}
QUESTION_TYPES |= {"outputs": list, "category": str}
OUTPUT_TYPES: dict[str, type | tuple[type, ...]] = {"text": str, "answer": (str, NoneType), "right": bool}
TASK_TYPES: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "benchmark": str,
    "data": dict,
    "rows": int,
    "settings": dict,
    "changed": tuple,
    "harness": dict,
}


@dataclass(frozen=True, kw_only=True)
class Output:
    """One answer of the model to a question, and how it was judged.

    Args:
        text: what the model wrote; empty for a log-likelihood task.
        answer: what was read from it, or None: no answer.
        right: the verdict.
        stock_answer, stock_right: the same by lm-eval's own task; ``stock_right`` None where it has none.
        tokens: how many the model wrote; None where unknown.
        truncated: the token limit ended it; None where unknown.
        scores: log-likelihood of each option, for a log-likelihood task.
        readings: other readings of the same text, ``{name: {"answer", "right"}}``; names of `letters.READINGS`.
        marks: what to look at, of `letters.MARKS`.
        prompt, order: what the model saw, where a repeat had its options in another order than the question's prompt: of A, B,
            C and D, which letter that option has there. ``answer`` and the readings are in the letters of the question's.
    """

    text: str
    answer: str | None
    right: bool
    stock_answer: str | None = None
    stock_right: bool | None = None
    tokens: int | None = None
    truncated: bool | None = None
    scores: dict[str, float] | None = None
    readings: dict[str, dict] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    prompt: str | None = None
    order: str | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its ``k`` outputs. ``id`` is unique in its task and the same in every run of the same data.

    ``prompt`` is what the model saw, special tokens and all; ``question`` the problem alone, for people.
    """

    id: str
    question: str
    prompt: str
    gold: str
    outputs: tuple[Output, ...]
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of an evaluation.

    Args:
        benchmark: key of the published figures, one of `BENCHMARKS`.
        data: ``{"source": "hub" | "folder" | "sample", "path", "revision", "sha256"}``; ``sample`` are rows of this
            project in the benchmark's format: their score is not the benchmark's.
        rows: questions in the data; fewer may have been asked.
        settings: the protocol's fields as they were used: ``{"max_tokens": 8192, "temperature": 0.0, ...}``.
        changed: what departs from the protocol, in words; empty when nothing does.
        harness: lm-eval's own figures for the task.
    """

    task: str
    benchmark: str
    data: dict
    rows: int
    settings: dict
    changed: tuple[str, ...] = ()
    harness: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run: of which model, under which protocol, with what.

    Args:
        model: ``{"label", "path", "config_sha256", "checkpoint_fingerprint", "dtype", "parameters", "quantization"}``.
        protocol: ``{"name", "fields": {name: {"value", "status": "documented" | "assumed", "source"}}}``.
    """

    model: dict
    suite: str
    protocol: dict
    tasks: tuple[TaskRun, ...]
    versions: dict
    seeds: dict
    date: str
    seconds: float
    command: str = ""
    machine: str = ""
    format: int = FORMAT


# Benchmark -> its name in the published figures.
BENCHMARKS = {
    "mmlu_pro": "MMLU-Pro",
    "gpqa_diamond": "GPQA-Diamond",
    "math500": "MATH-500",
    "math": "MATH",
    "aime24": "AIME 2024",
    "aime25": "AIME 2025",
    "aime26": "AIME 2026",
    "hmmt_feb25": "HMMT February 2025",
    "codeforces": "Codeforces",
    "swebench": "SWE-bench Verified",
    "livecodebench": "LiveCodeBench",
    "programs": "Programs",
}


def write_evaluation(folder: Path, evaluation: Evaluation, samples: dict[str, Iterable[Question]]) -> None:
    """Write ``samples`` (by task), then the evaluation: a folder with an ``evaluation.json`` is complete."""
    (folder / EVALUATION_FILE).unlink(missing_ok=True)
    for task, questions in samples.items():
        lines = (to_json(asdict(question)) + "\n" for question in questions)
        write_file(_samples_file(folder, task), "".join(lines))
    text = to_json(asdict(evaluation), indent=1, default=str)
    write_file(folder / EVALUATION_FILE, text + "\n")


def read_evaluation(folder: Path) -> Evaluation:
    """
    Raises:
        FileNotFoundError: no finished evaluation in the folder.
        ValueError: it is damaged, or of a later format; the message names the field.
    """
    file = Path(folder) / EVALUATION_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: found no {EVALUATION_FILE}, wanted the folder of a finished evaluation")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{file}: found format {found!r}, wanted {FORMAT}")
    values = _typed(EVALUATION_TYPES, _checked(Evaluation, values, file), file)
    entries = _typed({"fields": dict}, values["protocol"], f"{file}: protocol").get("fields", {})
    _typed(dict.fromkeys(entries, dict), entries, f"{file}: protocol.fields")
    tasks = tuple(TaskRun(**_typed(TASK_TYPES, _checked(TaskRun, task, file), file)) for task in values["tasks"])
    return Evaluation(**{**values, "tasks": tasks})


def read_questions(folder: Path, task: str) -> list[Question]:
    """
    Raises:
        FileNotFoundError: the task's samples are missing.
        ValueError: a line is damaged, the message names it.
    """
    file = _samples_file(Path(folder), task)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: found no samples, wanted those of the task {task!r}")
    questions = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            values = _typed(QUESTION_TYPES, _checked(Question, values, where), where)
            outputs = tuple(
                Output(**_typed(OUTPUT_TYPES, _checked(Output, output, where), where)) for output in values["outputs"]
            )
            if not outputs:
                raise ValueError(f"{where}: found no outputs, wanted at least one")
            questions.append(Question(**{**values, "outputs": outputs}))
    return questions


def _samples_file(folder: Path, task: str) -> Path:
    """In the folder whatever the task is called: what may not stand in a file's name is written as in a web address."""
    name = quote(task, safe="", errors="surrogatepass")
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return folder / SAMPLES_FOLDER / f"{name}.jsonl"


def _typed(kinds: Mapping[str, type | tuple[type, ...]], values: dict, where: object) -> dict:
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{where}: {name}: found {type(values[name]).__name__}, wanted {_kind_name(kind)}")
    return values


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in kind) if isinstance(kind, tuple) else kind.__name__


def _checked(kind: type, values: object, where: object) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: found {type(values).__name__}, wanted the fields of {kind.__name__}")
    known = {one.name for one in fields(kind)}
    needed = {name for name in known if name not in kind.__dict__ and name not in ("harness", "readings")}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{where}: found unknown field {unknown[0]!r} of {kind.__name__}")
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{where}: found no field {missing[0]!r} of {kind.__name__}")
    return {
        name: tuple(value) if name in ("changed", "marks") and isinstance(value, list) else value
        for name, value in values.items()
    }
