"""LiveCodeBench's rows: read without unpickling anything, and judged on functions and on programs as upstream judges them."""

import base64
import json
import pickle
import zlib

import pytest
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.eval.code import handover, livecodebench
from modeling_deepseek_moe.eval.code.livecodebench import judge, read_problems
from modeling_deepseek_moe.eval.code.sandbox import check
from modeling_deepseek_moe.eval.results import read_evaluation, read_questions

try:
    check()
    sandboxed = pytest.mark.skipif(False, reason="")
except OSError as error:
    sandboxed = pytest.mark.skip(reason=f"no sandbox here: {error}")


def packed(text, protocol=4):
    """As upstream packs private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()


def cases(*pairs, kind="stdin"):
    return [{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs]


DOUBLE = {
    "question_id": "d",
    "question_content": "Print twice the number.",
    "starter_code": "",
    "public_test_cases": json.dumps(cases(("1\n", "2\n"))),
    "private_test_cases": packed(json.dumps(cases(("4\n", "8"), ("7\n", "14\n")))),
    "metadata": "{}",
    "platform": "atcoder",
}
PAIR = {
    "question_id": "p",
    "question_content": "The two numbers, turned round.",
    "starter_code": "class Solution:\n    def turn(self, a: List[int], b: int) -> List[int]:\n        ",
    "public_test_cases": json.dumps(cases(("[1]\n2", "[2, 1]"), kind="functional")),
    "private_test_cases": json.dumps(cases(("[3]\n4", "[4, 3]"), kind="functional")),
    "metadata": json.dumps({"func_name": "turn"}),
}


def read(folder, *rows):
    (folder / "lcb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_problems(folder / "lcb.jsonl")


def block(source):
    return f"So:\n```python\n{source}\n```\n"


@pytest.mark.parametrize("protocol", range(6))
def test_private_tests_of_every_pickle_protocol(tmp_path, protocol):
    text = json.dumps(cases(("ä\n" * 300, "漢")), ensure_ascii=False)
    (problem,) = read(tmp_path, DOUBLE | {"private_test_cases": packed(text, protocol)})
    assert list(problem.tests()) == [("1\n", "2\n"), ("ä\n" * 300, "漢")]


def test_rows_in_the_forms_in_which_they_go_round(tmp_path):
    plain = base64.b64encode(zlib.compress(json.dumps(cases(("4\n", "8"))).encode())).decode()
    for private in (cases(("4\n", "8")), json.dumps(cases(("4\n", "8"))), plain, "", None, []):
        (problem,) = read(tmp_path, DOUBLE | {"private_test_cases": private, "metadata": {}, "starter_code": None})
        assert next(problem.tests()) == ("1\n", "2\n") and len(list(problem.tests())) == (2 if private else 1)
    (tmp_path / "lcb.json").write_text(json.dumps([DOUBLE, PAIR]))
    assert [problem.id for problem in read_problems(tmp_path / "lcb.json")] == ["d", "p"]


class Harmful:
    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return (eval, (self.what,))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one, "text"], lambda one: {"text": one}])
def test_nothing_is_unpickled(tmp_path, protocol, wrap):
    harm = f"open({str(tmp_path / 'harm')!r}, 'w').write('x')"
    value = base64.b64encode(zlib.compress(pickle.dumps(wrap(Harmful(harm)), protocol))).decode()
    with pytest.raises(
        ValueError, match=r"lcb.jsonl: row 1: private_test_cases: found a pickle with its instruction \w+"
    ):
        read(tmp_path, DOUBLE | {"private_test_cases": value})
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("value", [["text"], {"a": 1}, 7, None, b"text", ("a", "b"), 2.5])
def test_a_pickle_of_anything_but_a_text_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"row 1: private_test_cases: found a pickle"):
        read(tmp_path, DOUBLE | {"private_test_cases": packed(value)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"question_id": None}, "question_id: found null, wanted a name or a number"),
        ({"question_content": " "}, "question_content: found ' ', wanted text"),
        ({"starter_code": 3}, "starter_code: found 3, wanted text"),
        ({"metadata": "{"}, "metadata: found '{', wanted JSON"),
        ({"metadata": {"func_name": "a b"}}, "metadata: found .* the name of a function"),
        ({"metadata": [1]}, "metadata: found"),
        ({"metadata": {"func_name": "turn"}}, "test 1: testtype: found 'stdin', wanted 'functional'"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "wanted at least one test"),
        ({"public_test_cases": {"input": ""}}, "public_test_cases: found .*, wanted a list of tests"),
        (
            {"public_test_cases": [{"input": "1"}]},
            "public_test_cases: test 1: found .*, wanted input and output as text",
        ),
        ({"private_test_cases": [{"input": "1", "output": 2}]}, "private_test_cases: test 1: found"),
        ({"private_test_cases": "not base64!"}, "private_test_cases: found 'not base64!' .* wanted JSON"),
        (
            {"private_test_cases": base64.b64encode(b"data").decode()},
            "private_test_cases: found 'ZGF0YQ==' .* wanted JSON",
        ),
        ({"private_test_cases": packed("[")}, "private_test_cases: found '\\[', wanted JSON"),
        (
            {"private_test_cases": packed("[]" * 99)[:-20]},
            "private_test_cases: found data that is cut off, wanted JSON",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"lcb.jsonl: row 2: {message}|lcb.jsonl: row 2: .*{message}"):
        read(tmp_path, PAIR, DOUBLE | changes)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"row 2: question_id: found 'd', wanted an id of its own: row 1 has this"):
        read(tmp_path, DOUBLE, DOUBLE)
    with pytest.raises(ValueError, match="found no rows, wanted at least one problem"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"test 1: input: found 'x', wanted JSON"):
        read(tmp_path, PAIR | {"private_test_cases": cases(("x", "1"), kind="functional")})
    bomb = base64.b64encode(zlib.compress(bytes(600 << 20), 1)).decode()
    with pytest.raises(ValueError, match="private_test_cases: found over 512 MiB"):
        read(tmp_path, DOUBLE | {"private_test_cases": bomb})


def test_the_prompt_is_upstreams(tmp_path):
    double, pair = read(tmp_path, DOUBLE, PAIR)
    assert double.prompt.startswith("### Question:\nPrint twice the number.\n\n### Format: Read the inputs from stdin")
    assert "```python\n# YOUR CODE HERE\n```" in double.prompt
    assert f"enclose your code within delimiters.\n```python\n{PAIR['starter_code']}\n```" in pair.prompt
    assert pair.prompt.endswith("### Answer: (use the provided format with backticks)\n\n")


TURN = "class Solution:\n    def turn(self, a: List[int], b: int) -> List[int]:\n"


@sandboxed
@pytest.mark.parametrize(
    "row, source, verdict, test",
    [
        (DOUBLE, "print(2 * int(input()))", "accepted", None),
        (
            DOUBLE,
            "from __future__ import annotations\nif __name__ == '__main__':\n    print(2 * int(input()))",
            "accepted",
            None,
        ),
        (DOUBLE, "print(f'{2 * Counter([input()]).total() * 1.0}')", "wrong answer", 2),
        (DOUBLE, "print(f'{2.0 * int(stdin.readline())}')", "accepted", None),  # 2.0 and 2 are one decimal
        (DOUBLE, "print(2 * int(input()), end='  \\n\\n')", "accepted", None),
        (DOUBLE, "print(2 * int(input())); print()", "accepted", None),
        (DOUBLE, "print(); print(2 * int(input())); print(1)", "wrong answer", 1),
        (DOUBLE, "raise ValueError", "error", 1),
        (DOUBLE, "import os; os.fork()", "forbidden", 1),
        (
            DOUBLE,
            "def f(n): return f(n - 1) + 1 if n else 0\nprint(2 * int(input()) + f(5000) - 5000)",
            "accepted",
            None,
        ),
        (PAIR, TURN + "        return [b, *a]", "accepted", None),
        (PAIR, TURN + "        print('seen', a)\n        return (b, *a)", "accepted", None),
        (PAIR, TURN + "        return [a, b]", "wrong answer", 1),
        (PAIR, TURN + "        return [(b,), *a]", "wrong answer", 1),
        (PAIR, TURN + "        return {b}", "error", 1),
        (PAIR, "def turn(a, b):\n    return [b] + a", "accepted", None),
        (PAIR, "def other(a, b):\n    return [b] + a", "error", 1),
        (
            PAIR,
            TURN + "        import sys\n        sys.__stdout__.write('[2, 1]')\n        return [b, *a]",
            "wrong answer",
            1,
        ),
        (PAIR, TURN + "        return [b, *a]\nif __name__ == '__main__':\n    print(1 / 0)", "accepted", None),
    ],
)
def test_verdicts(tmp_path, row, source, verdict, test):
    (problem,) = read(tmp_path, row)
    got = judge(problem, block(source))
    assert (got.verdict, got.test) == (verdict, test), got


def test_no_program(tmp_path):
    assert judge(read(tmp_path, DOUBLE)[0], "I cannot.").verdict == "no program"


@pytest.mark.parametrize(
    "wanted, got, same",
    [
        ("1 2\n3", "1 2 \n3\n", True),
        ("1 2\n3", "1 2 3", False),
        ("0.50", "0.5", True),
        ("1e2 x", "100 x", False),
        ("1", "sNaN", False),
        ("50000000000000000", "50000000000000001", False),
        ("Yes", "YES", False),
    ],
)
def test_lines(wanted, got, same):
    assert livecodebench._same_lines(wanted, got) is same


def test_values():
    assert livecodebench._same_value("1", "1.0") and livecodebench._same_value("[true]", "[1]")
    assert not livecodebench._same_value("[1]", "[" * 100_000) and not livecodebench._same_value("1", "")


@sandboxed
def test_from_the_model_to_the_report(tmp_path):
    read(tmp_path, DOUBLE, PAIR)
    command = ["predict", "livecodebench", "--data", str(tmp_path / "lcb.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--max-tokens", "8"])
    assert result.exit_code == 0 and "livecodebench: 0.0 % of 2 right" in result.output
    file = tmp_path / "out" / handover.ANSWERS
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    answers[0]["text"] = "thoughts: " + block("print(0)") + "</think>" + block("print(2 * int(input()))")
    file.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    problems = read_problems(tmp_path / "lcb.jsonl")
    handover.judge_programs(tmp_path / "out", problems, str(tmp_path / "lcb.jsonl"), "livecodebench")
    questions = read_questions(tmp_path / "out", "livecodebench")
    assert [question.outputs[0].right for question in questions] == [True, False]
    assert read_evaluation(tmp_path / "out").tasks[0].benchmark == "livecodebench"


def test_the_command_refuses(tmp_path):
    result = CliRunner().invoke(app, ["predict", "livecodebench", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "found no --data, wanted the questions of livecodebench" in " ".join(
        result.output.split()
    )
    result = CliRunner().invoke(app, ["predict", "livecodebench", "--judged", "x", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "livecodebench have no use for" in " ".join(result.output.split())
