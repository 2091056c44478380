"""LiveCodeBench: its rows read, its prompt, and programs judged on its tests, in the sandbox instead of in this process.

A row has ``question_id``, ``question_content``, ``starter_code`` (empty where a program reads from stdin), ``metadata`` with
``func_name`` where a function is asked for, ``public_test_cases`` and ``private_test_cases``: lists of ``input``, ``output`` and
``testtype``, or JSON of such a list. Upstream's private ones are JSON in a pickle, compressed, in base64: the one text in it is read
by walking over the pickle's instructions, none of which is carried out. What is right is as its ``testing_util.py`` has it.
"""

import base64
import binascii
import json
import pickletools
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from modeling_deepseek_moe.eval import rows
from modeling_deepseek_moe.eval.code.problems import Verdict, program
from modeling_deepseek_moe.eval.code.sandbox import Limits, Result, run
from modeling_deepseek_moe.eval.data import read_file

LIMITS = Limits(seconds=6.0, memory=4 << 30)  # upstream's
DECODED = 512 << 20  # bytes of a row's private tests
_FRAMING = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
_TEXT = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_WITH_STARTER = "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
_WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample inputs). "
    "Enclose your code within delimiters as follows."
)
# What upstream imports before a program, and so what programs use without importing it.
_IMPORTED = (
    *(
        "string",
        "re",
        "datetime",
        "collections",
        "heapq",
        "bisect",
        "copy",
        "math",
        "random",
        "statistics",
        "itertools",
    ),
    *("functools", "operator", "io", "sys", "json"),
)
_DRIVER = f"""import json, sys
names = {{"__name__": "__main__"}}
for module in {(*_IMPORTED, "builtins", "typing")}:
    exec(f"from {{module}} import *", names)
for module in {_IMPORTED}:
    exec(f"import {{module}}", names)
sys.setrecursionlimit(50000)
with open("solution.py", encoding="utf-8") as file:
    source = file.read()
"""
_STDIN = _DRIVER + 'exec(compile(source, "solution.py", "exec"), names)\n'
# What it prints itself is no result. Tuples within the result are none of the lists that are wanted, as upstream.
_FUNCTION = (
    _DRIVER
    + """
def plain(value):
    if isinstance(value, tuple):
        return {"tuple": [plain(one) for one in value]}
    return [plain(one) for one in value] if isinstance(value, list) else value

arguments = [json.loads(line) for line in sys.stdin.read().split("\\n")]
answers, sys.stdout = sys.stdout, sys.stderr
names["__name__"] = "solution"
exec(compile(source, "solution.py", "exec"), names)
owner = names["Solution"]() if "class Solution" in source else None
result = (getattr(owner, FUNCTION) if owner is not None else names[FUNCTION])(*arguments)
answers.write(json.dumps(plain(list(result) if isinstance(result, tuple) else result)))
"""
)


@dataclass(frozen=True, kw_only=True)
class LiveProblem:
    """``function``: what is called; empty where a program reads from stdin. ``given``: the test cases as the row has them."""

    id: str
    statement: str
    starter: str
    function: str
    given: tuple[object, object]

    @property
    def prompt(self) -> str:
        """Upstream's question template."""
        words, code = (_WITH_STARTER, self.starter) if self.starter else (_WITHOUT_STARTER, "# YOUR CODE HERE")
        question = f"### Question:\n{self.statement}\n\n### Format: {words}\n```python\n{code}\n```\n\n"
        return question + "### Answer: (use the provided format with backticks)\n\n"

    def tests(self) -> Iterator[tuple[str, str]]:
        """Input and output, the public ones first; decoded each time: those of a release fill memory."""
        for field, value in zip(("public_test_cases", "private_test_cases"), self.given, strict=True):
            for number, test in enumerate(_cases(field, value), 1):
                yield self._checked(f"{field}: test {number}", test)

    def _checked(self, where: str, test: object) -> tuple[str, str]:
        if not isinstance(test, dict) or not all(isinstance(test.get(name), str) for name in ("input", "output")):
            raise ValueError(f"{where}: found {_short(test)}, wanted input and output as text")
        kind = "functional" if self.function else "stdin"
        if test.get("testtype", kind) != kind:
            raise ValueError(
                f"{where}: testtype: found {_short(test['testtype'])}, wanted {kind!r}, by the metadata's func_name"
            )
        if self.function:
            for name in ("input", "output"):
                for line in test[name].split("\n") if name == "input" else [test[name]]:
                    _json(f"{where}: {name}", line)
        return test["input"], test["output"]


def read_problems(file: Path) -> list[LiveProblem]:
    """
    Raises:
        ValueError: a row is no problem, or its id comes twice; the message names file, row, field, found and wanted.
        FileNotFoundError: no such file.
    """
    problems, first = [], {}
    for number, row in read_file(Path(file)):
        try:
            problem = _problem(row)
            if not sum(1 for _ in problem.tests()):  # all of them: each is looked at
                raise ValueError("private_test_cases: found none and no public ones, wanted at least one test")
            if problem.id in first:
                raise ValueError(
                    f"question_id: found {problem.id!r}, wanted an id of its own: row {first[problem.id]} has this"
                )
        except ValueError as error:
            raise ValueError(f"{file}: row {number}: {error}") from None
        first[problem.id] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{file}: found no rows, wanted at least one problem")
    return problems


def judge(problem: LiveProblem, text: str) -> Verdict:
    """Run the program of a model's text on the problem's tests, up to the first that fails.

    Raises:
        OSError: this machine has no sandbox.
    """
    source = program(text)
    if source is None:
        return Verdict(verdict="no program")
    slowest = 0.0
    driver = _FUNCTION.replace("FUNCTION", repr(problem.function)) if problem.function else _STDIN
    right = _same_value if problem.function else _same_lines
    for number, (given, wanted) in enumerate(problem.tests(), 1):
        result = _run(driver, source, given)
        slowest = max(slowest, result.seconds)
        got = result.stdout.decode(errors="replace")
        if result.verdict != "ok":
            detail = result.stderr.decode(errors="replace")[-500:]
            return Verdict(verdict=result.verdict, test=number, seconds=slowest, detail=detail)
        if not right(wanted, got):
            detail = f"wanted {wanted[:200]!r}, found {got[:200]!r}"
            return Verdict(verdict="wrong answer", test=number, seconds=slowest, detail=detail)
    return Verdict(verdict="accepted", seconds=slowest)


def _run(driver: str, source: str, given: str) -> Result:
    command = [sys.executable, "-I", "-S", "-B", "program.py"]
    files = {"program.py": driver.encode(), "solution.py": source.encode(errors="replace")}
    return run(command, given.encode(errors="replace"), limits=LIMITS, files=files)


def _same_value(wanted: str, got: str) -> bool:
    try:
        return bool(json.loads(got) == json.loads(wanted))
    except (ValueError, RecursionError):  # what the program wrote to stdout besides, or nested beyond measure
        return False


def _same_lines(wanted: str, got: str) -> bool:
    """Line by line without the space around; numbers as decimals."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (wanted, got))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(wanted: str, got: str) -> bool:
    try:
        return [Decimal(word) for word in wanted.split()] == [Decimal(word) for word in got.split()]
    except InvalidOperation:
        return False


def _problem(row: object) -> LiveProblem:
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, wanted an object with columns")
    fields: dict[str, Callable[[object], str | None]] = {
        "question_id": rows.name,
        "question_content": rows.text,
        "starter_code": rows.perhaps_text,
    }
    for name, rule in fields.items():
        if wanted := rule(row.get(name)):
            raise ValueError(f"{name}: found {_short(row.get(name))}, wanted {wanted}")
    metadata = row.get("metadata") or {}
    metadata = _json("metadata", metadata) if isinstance(metadata, str) else metadata
    function = metadata.get("func_name") or "" if isinstance(metadata, dict) else None
    if not isinstance(function, str) or (function and not function.isidentifier()):
        raise ValueError(
            f"metadata: found {_short(metadata)}, wanted an object, its func_name, if any, the name of a function"
        )
    given = row.get("public_test_cases"), row.get("private_test_cases")
    starter = row.get("starter_code") or ""
    return LiveProblem(
        id=str(row["question_id"]), statement=row["question_content"], starter=starter, function=function, given=given
    )


def _cases(field: str, value: object) -> list:
    """The list that a field is, or is JSON of, or is packed JSON of; nothing where there is no such field."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _json(field, _unpacked(field, value))
    if not isinstance(value, list):
        raise ValueError(f"{field}: found {_short(value)}, wanted a list of tests, or JSON of one")
    return value


def _unpacked(field: str, value: str) -> str:
    wanted = "JSON, or JSON compressed by zlib, in base64"
    try:
        packed = base64.b64decode(value, validate=True)
        opened = zlib.decompressobj()
        data = opened.decompress(packed, DECODED)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"{field}: found {_short(value)} ({error}), wanted {wanted}") from None
    if not opened.eof:
        fault = f"over {DECODED >> 20} MiB" if len(data) >= DECODED else "data that is cut off"
        raise ValueError(f"{field}: found {fault}, wanted {wanted}")
    return data.decode(errors="replace") if data.lstrip()[:1] == b"[" else _pickled_text(field, data)


def _pickled_text(field: str, data: bytes) -> str:
    """The text that a pickle is of. Nothing is unpickled: a pickle of anything else than one text is refused."""
    found = []
    try:
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name in _TEXT:
                found.append(argument)
            elif instruction.name not in _FRAMING:
                raise ValueError(f"its instruction {instruction.name}")
    except ValueError as error:
        raise ValueError(
            f"{field}: found a pickle with {error}, wanted one of a text and nothing else: it is not run"
        ) from None
    if len(found) != 1:
        raise ValueError(f"{field}: found a pickle of {len(found)} texts, wanted one")
    return found[0]


def _json(where: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: found {_short(text)}, wanted JSON: {error}") from None


def _short(value: object) -> str:
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
