"""SWE-bench: predictions for the official harness, its command, and its report read back. Nothing is judged here."""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.eval.code.problems import blocks

VERIFIED = "SWE-bench/SWE-bench_Verified"
FIELDS = ("instance_id", "model_name_or_path", "model_patch")  # of a prediction, swebench.harness.constants
_START = re.compile(r"^(?:diff --git |--- )", re.MULTILINE)


def patch(text: str) -> str | None:
    """The unified diff of a model's text: in its last code block that has one, else from where one begins; None without one."""
    fenced = [content for _, content in blocks(text) if _is_diff(content)]
    if fenced:
        return fenced[-1]
    start = _START.search(text)
    rest = text[start.start() :] if start else ""
    return rest.rstrip("\n") + "\n" if _is_diff(rest) else None


def _is_diff(text: str) -> bool:
    return all(re.search(pattern, text, re.MULTILINE) for pattern in (r"^--- ", r"^\+\+\+ ", r"^@@ "))


def write_predictions(file: Path, model: str, texts: Iterable[tuple[str, str]]) -> tuple[int, int]:
    """The official harness' JSON lines; an instance without a diff has an empty patch, which it counts. How many, and how many empty.

    Args:
        texts: instance id and what the model wrote.
    """
    lines, empty = [], 0
    for instance, text in texts:
        diff = patch(text)
        empty += diff is None
        lines.append(json.dumps(dict(zip(FIELDS, (instance, model, diff or ""), strict=True))) + "\n")
    write_file(Path(file), "".join(lines))
    return len(lines), empty


def command(predictions: Path, run_id: str, workers: int = 4) -> str:
    """What judges them, with Docker and ``pip install swebench``."""
    parts = ["python", "-m", "swebench.harness.run_evaluation", "--dataset_name", VERIFIED, "--predictions_path"]
    return shlex.join([*parts, str(predictions), "--run_id", run_id, "--max_workers", str(workers)])


def read_report(file: Path, asked: Iterable[str]) -> tuple[set[str], int]:
    """Of the report that the official harness writes: the ids that are resolved, and how many instances the data set has.

    Args:
        asked: ids that have a prediction; the harness calls all others incomplete.

    Raises:
        ValueError: it is no such report, or some that were asked were not run, or failed by the machine's fault.
    """
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
        resolved, total = set(report["resolved_ids"]), report["total_instances"]
        undone = set(report["incomplete_ids"]) & set(asked)
        failures = set(report.get("infra_failure_ids", ()))  # a patch that does not apply is not among them
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: no report of swebench: {error}") from None
    if unknown := sorted(resolved - set(asked)):
        raise ValueError(f"{file}: found {unknown[0]!r} resolved, which was not asked")
    if undone or failures:
        name = min(undone | failures)
        raise ValueError(
            f"{file}: found {len(undone)} instances not run and {len(failures)} that the machine failed, {name!r} the first, "
            "wanted none: run it again"
        )
    return resolved, total
