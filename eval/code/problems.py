"""Problems of programs that read stdin and write stdout: reading them, taking a program from a text, judging it.

A problem is a line of JSON: ``id``, ``statement``, ``tests`` (``[{"input", "output"}, ...]``), and if need be ``seconds`` (2),
``memory`` (bytes, 512 MiB), ``tolerance`` (numbers may differ so much, absolutely or relatively).
"""

import json
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_deepseek_moe.eval.code.sandbox import Limits, run_python

SAMPLES = Path(__file__).parent / "samples.jsonl"
PROMPT = (
    "Solve this programming problem in Python 3. The program reads from standard input and writes to standard output. "
    "Put the whole program into one ```python code block.\n\n"
)
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Problem:
    id: str
    statement: str
    tests: tuple[tuple[str, str], ...]  # input, output
    seconds: float = 2.0
    memory: int = 512 << 20
    tolerance: float = 0.0

    @property
    def prompt(self) -> str:
        return PROMPT + self.statement


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``verdict``: ``accepted``, ``wrong answer``, ``no program``, or what the sandbox says of the first test that failed, whose
    number (from 1) is ``test``."""

    verdict: str
    test: int | None = None
    seconds: float = 0.0
    detail: str = ""

    @property
    def accepted(self) -> bool:
        return self.verdict == "accepted"


def read_problems(file: Path = SAMPLES) -> list[Problem]:
    """
    Raises:
        ValueError: a line is no problem; the message names it. FileNotFoundError: no such file.
    """
    problems: list[Problem] = []
    first: dict[str, int] = {}
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                tests = tuple((test["input"], test["output"]) for test in row.pop("tests"))
                row.pop("solution", None)
                problem = Problem(tests=tests, **row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{file}:{number}: no problem: {error}; wanted id, statement, tests of input and output"
                ) from None
            if not tests:
                raise ValueError(f"{file}:{number}: found no tests, wanted at least one")
            for field, (value, fits, wanted) in _fields(problem).items():
                if not fits:
                    raise ValueError(f"{file}:{number}: {field}: found {value!r:.80}, wanted {wanted}")
            if problem.id in first:
                raise ValueError(f"{file}:{number}: id: found {problem.id!r}, which line {first[problem.id]} has too")
            first[problem.id] = number
            problems.append(problem)
    if not problems:
        raise ValueError(f"{file}: found no lines, wanted at least one problem")
    return problems


def _fields(problem: Problem) -> dict[str, tuple[Any, bool, str]]:
    """Field -> its value, whether it may be that, and what was wanted."""
    texts = {"id": problem.id, "statement": problem.statement}
    found: dict[str, tuple[Any, bool, str]] = {
        name: (value, isinstance(value, str) and bool(value.strip()), "text") for name, value in texts.items()
    }
    for number, test in enumerate(problem.tests, 1):
        found[f"tests: {number}"] = test, all(isinstance(text, str) for text in test), "input and output as text"
    for name, above in (("seconds", 0), ("memory", 0), ("tolerance", -1)):
        value = getattr(problem, name)
        number_fits = isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf
        found[name] = value, number_fits, "a number of at least 0" if above else "a number above 0"
    return found


def program(text: str) -> str | None:
    """The last whole code block of a text, Python or unnamed; None without one."""
    found = [content for language, content in blocks(text) if language in ("", "python", "python3", "py")]
    return textwrap.dedent(found[-1]) if found else None  # blocks in lists are indented


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block that is closed. Linear in the text's length."""
    opened = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        else:
            yield opened[1].lower(), text[opened.end() + 1 : fence.start()]
            opened = None


def judge(problem: Problem, text: str) -> Verdict:
    """Run the program of a model's text on the problem's tests, up to the first that fails.

    Raises:
        OSError: this machine has no sandbox.
    """
    source = program(text)
    if source is None:
        return Verdict(verdict="no program")
    slowest = 0.0
    limits = Limits(seconds=problem.seconds, memory=problem.memory)
    for number, (given, wanted) in enumerate(problem.tests, 1):
        result = run_python(source, given.encode(errors="surrogatepass"), limits=limits)
        slowest = max(slowest, result.seconds)
        got = result.stdout.decode(errors="replace")
        if result.verdict != "ok":
            detail = result.stderr.decode(errors="replace")[-500:]
            return Verdict(verdict=result.verdict, test=number, seconds=slowest, detail=detail)
        if not same_output(wanted, got, problem.tolerance):
            detail = f"wanted {wanted[:200]!r}, found {got[:200]!r}"
            return Verdict(verdict="wrong answer", test=number, seconds=slowest, detail=detail)
    return Verdict(verdict="accepted", seconds=slowest)


def same_output(wanted: str, got: str, tolerance: float = 0.0) -> bool:
    """Word by word, whatever white space is between them; numbers within ``tolerance``."""
    ours, theirs = wanted.split(), got.split()
    return len(ours) == len(theirs) and all(map(lambda a, b: a == b or _close(a, b, tolerance), ours, theirs))


def _close(wanted: str, got: str, tolerance: float) -> bool:
    if not tolerance:
        return False
    try:
        return math.isclose(float(wanted), float(got), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
