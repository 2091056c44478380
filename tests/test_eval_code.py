"""Judging programs, and what is handed to the official judges and read back."""

import json
import shlex
import time

import pytest
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.eval.code import codeforces, handover, swebench
from modeling_deepseek_moe.eval.code.problems import SAMPLES, Problem, judge, program, read_problems, same_output
from modeling_deepseek_moe.eval.code.sandbox import check
from modeling_deepseek_moe.eval.results import read_evaluation, read_questions

try:
    check()
    sandboxed = pytest.mark.skipif(False, reason="")
except OSError as error:
    sandboxed = pytest.mark.skip(reason=f"no sandbox here: {error}")

DOUBLE = Problem(id="d", statement="Print twice the number.", tests=(("1\n", "2\n"), ("4\n", "8\n")))
DIFF = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n"


def block(source, language="python"):
    return f"Here:\n```{language}\n{source}\n```\nDone."


@sandboxed
@pytest.mark.parametrize("problem", read_problems(), ids=lambda problem: problem.id)
def test_reference_solutions_are_accepted(problem):
    rows = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    solution = next(row["solution"] for row in rows if row["id"] == problem.id)
    assert judge(problem, block(solution)).accepted
    wrong = judge(problem, block("print(input()[:0] + 'x')"))
    assert wrong.verdict == "wrong answer" and wrong.test == 1


@sandboxed
@pytest.mark.parametrize(
    "source, verdict, test",
    [
        ("print(int(input()) * 2)", "accepted", None),
        ("print(2)", "wrong answer", 2),
        ("print(int(input()) * 2, 0)", "wrong answer", 1),
        ("while True: pass", "timeout", 1),
        ("import os; os.fork()", "forbidden", 1),
        ("print(", "error", 1),
    ],
)
def test_verdicts(source, verdict, test):
    got = judge(Problem(id="d", statement="", tests=DOUBLE.tests, seconds=1), block(source))
    assert (got.verdict, got.test) == (verdict, test)


def test_no_program():
    assert judge(DOUBLE, "I cannot.").verdict == "no program"


@pytest.mark.parametrize(
    "text, found",
    [
        (block("a = 1"), "a = 1\n"),
        (block("a") + block("b", "py"), "b\n"),
        (block("a") + block("x", "text") + block("y", "cpp"), "a\n"),
        ("```\na\n```", "a\n"),
        ("```python\nnever closed", None),
        ("  ```python\n  a\n  ```", "a\n"),
        ("none", None),
    ],
)
def test_the_last_whole_block_is_the_program(text, found):
    assert program(text) == found


def test_extraction_is_linear():
    for text in (
        "```python\n" * 100_000,
        "```" * 300_000,
        "``` " + " " * 1_000_000,
        "--- \n" * 200_000,
        "```diff\n" * 100_000,
    ):
        start = time.perf_counter()
        program(text)
        swebench.patch(text)
        assert time.perf_counter() - start < 2


def test_output_is_compared_word_by_word():
    assert same_output("1 2\n3\n", " 1\n2 3 ")
    assert not same_output("1 2", "12") and not same_output("1", "1 1") and not same_output("0.5", "0.50")
    assert same_output("0.5 x", "0.5000001 x", 1e-6) and not same_output("0.5", "0.51", 1e-6)
    assert not same_output("x", "nan", 1) and not same_output("1", "nan", 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "p.jsonl:2: no problem"),
        ('{"id": "x", "statement": "y"}', "'tests'; wanted id, statement, tests"),
        ('{"id": "x", "statement": "y", "tests": []}', "found no tests, wanted at least one"),
        ('{"id": "x", "statement": "y", "tests": [{"input": ""}]}', "'output'"),
        ('{"id": "x", "statement": "y", "tests": [{"input": "", "output": ""}], "colour": 1}', "colour"),
        (
            '{"id": "a", "statement": "y", "tests": [{"input": "", "output": ""}]}',
            "id: found 'a', which line 1 has too",
        ),
        ('{"id": 3, "statement": "y", "tests": [{"input": "", "output": ""}]}', "p.jsonl:2: id: found 3, wanted text"),
        (
            '{"id": "x", "statement": null, "tests": [{"input": "", "output": ""}]}',
            "statement: found None, wanted text",
        ),
        (
            '{"id": "x", "statement": "y", "tests": [{"input": "", "output": null}]}',
            "tests: 1: found .*, wanted input and",
        ),
        (
            '{"id": "x", "statement": "y", "seconds": 0, "tests": [{"input": "", "output": ""}]}',
            "seconds: found 0, wanted a number above 0",
        ),
        (
            '{"id": "x", "statement": "y", "tolerance": NaN, "tests": [{"input": "", "output": ""}]}',
            "tolerance: found nan, wanted a number of at least 0",
        ),
    ],
)
def test_bad_problems_are_named(tmp_path, line, message):
    good = json.dumps({"id": "a", "statement": "b", "tests": [{"input": "", "output": ""}]})
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_problems(tmp_path / "p.jsonl")


def test_submissions_and_judged_ones(tmp_path):
    file = tmp_path / "s.jsonl"
    assert codeforces.write_submissions(file, [("1A", block("print(1)")), ("1B", "no idea")]) == (1, 1)
    assert json.loads(file.read_text()) == {"problem": "1A", "language": "python3", "program": "print(1)\n"}
    file.write_text(
        '{"problem": "1A", "rating": 800, "solved": true}\n{"problem": "1B", "rating": 1200, "solved": false}\n'
    )
    assert codeforces.read_judged(file) == {"1A": (800, True), "1B": (1200, False)}
    file.write_text('{"problem": "1A", "rating": 800, "solved": true}\n' * 2)
    with pytest.raises(ValueError, match=r"s.jsonl:2: found '1A' twice"):
        codeforces.read_judged(file)
    for line in (
        '{"problem": "1A", "rating": 800}',
        '{"problem": "1A", "rating": "800", "solved": true}',
        '{"problem": "1A", "rating": 800, "solved": 1}',
        '{"rating": 800, "solved": true}',
        "x",
    ):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=r"s.jsonl:1: "):
            codeforces.read_judged(file)
    file.write_text("")
    with pytest.raises(ValueError, match="found no judged submissions"):
        codeforces.read_judged(file)


def test_rating_solves_its_equation():
    assert codeforces.rating([(1000, True), (1000, False)]) == pytest.approx(1000, abs=1e-6)
    ten = [(1500, True)] * 10 + [(1500, False)]
    assert codeforces.rating(ten) == pytest.approx(1900, abs=1e-6)  # odds of ten to one are 400 points
    mixed = [(800, True), (1200, True), (1400, False), (2000, True), (2400, False)]
    likelihood = {value: _likelihood(mixed, value) for value in range(600, 3000, 5)}
    assert codeforces.rating(mixed) == pytest.approx(max(likelihood, key=likelihood.get), abs=5)
    for verdict in (True, False):
        with pytest.raises(ValueError, match="needs some solved and some not"):
            codeforces.rating([(1000, verdict)] * 3)


def _likelihood(judged, value):
    product = 1.0
    for problem, solved in judged:
        chance = 1 / (1 + 10 ** ((problem - value) / 400))
        product *= chance if solved else 1 - chance
    return product


def test_percentile_needs_a_table_that_reaches_it(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("rating,percentile\n1000,40\n1200,60\n2000,95\n")
    assert codeforces.percentile(1100, table) == pytest.approx(50)
    assert codeforces.percentile(2000, table) == pytest.approx(95)
    with pytest.raises(ValueError, match="found ratings 1000 to 2000, wanted 2400 among them"):
        codeforces.percentile(2400, table)
    for text in (
        "rating\n1\n",
        "rating,percentile\n1,x\n",
        "rating,percentile\n1,5\n",
        "rating,percentile\n1,5\n2,3\n",
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=r"t.csv: "):
            codeforces.percentile(1, table)


@pytest.mark.parametrize(
    "text, found",
    [
        (f"Fix:\n```diff\n{DIFF}```\n", DIFF),
        (f"```diff\n{DIFF.replace('b', 'c')}```\nbetter:\n```patch\n{DIFF}```", DIFF),
        (f"so\n{DIFF}", DIFF),
        (f"```python\nx\n```\n\ndiff --git a/x.py b/x.py\n{DIFF}", f"diff --git a/x.py b/x.py\n{DIFF}"),
        ("no patch", None),
        ("--- only\n", None),
    ],
)
def test_patches_are_found(text, found):
    assert swebench.patch(text) == found


def test_predictions_in_the_official_format(tmp_path):
    file = tmp_path / "preds.jsonl"
    assert swebench.write_predictions(file, "mine", [("a__b-1", f"```diff\n{DIFF}```"), ("a__b-2", "sorry")]) == (2, 1)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {"instance_id": "a__b-1", "model_name_or_path": "mine", "model_patch": DIFF},
        {"instance_id": "a__b-2", "model_name_or_path": "mine", "model_patch": ""},
    ]
    words = shlex.split(swebench.command(tmp_path / "a b.jsonl", "run 1"))
    assert words[:3] == ["python", "-m", "swebench.harness.run_evaluation"]
    assert (
        words[words.index("--predictions_path") + 1].endswith("a b.jsonl")
        and words[words.index("--run_id") + 1] == "run 1"
    )


def test_instances_and_the_official_report(tmp_path):
    file = tmp_path / "i.jsonl"
    file.write_text('{"instance_id": "a", "text": "A"}\n{"instance_id": "b", "text": "B"}\n')
    assert handover.read_prompts(file, "instance_id", "text") == {"a": "A", "b": "B"}
    for line in (
        '{"instance_id": "a", "text": "C"}',
        '{"id": "c", "text": "C"}',
        "x",
        '{"instance_id": 3, "text": "C"}',
        '{"instance_id": "c", "text": null}',
        '{"instance_id": "c", "text": " "}',
        '{"instance_id": "", "text": "C"}',
    ):
        file.write_text('{"instance_id": "a", "text": "A"}\n' + line)
        with pytest.raises(ValueError, match=r"i.jsonl:2: "):
            handover.read_prompts(file, "instance_id", "text")
    report = {"total_instances": 500, "resolved_ids": ["a"], "incomplete_ids": ["c"], "infra_failure_ids": []}
    file.write_text(json.dumps(report))
    assert swebench.read_report(file, ["a", "b"]) == ({"a"}, 500)
    for change in ({"incomplete_ids": ["b"]}, {"infra_failure_ids": ["b"]}):
        file.write_text(json.dumps(report | change))
        with pytest.raises(ValueError, match=r"'b' the first, wanted none: run it again"):
            swebench.read_report(file, ["a", "b"])
    file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="found 'a' resolved, which was not asked"):
        swebench.read_report(file, ["b"])
    for text in ("{}", "[]", "x"):
        file.write_text(text)
        with pytest.raises(ValueError, match="no report of swebench"):
            swebench.read_report(file, [])


def invoke(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


@sandboxed
def test_own_problems_from_the_model_to_the_report(tmp_path):
    result = invoke("programs", "--out", tmp_path, "--max-tokens", "8")
    assert result.exit_code == 0 and "programs: 0.0 % of 6 right" in result.output
    questions = read_questions(tmp_path, "programs")
    assert {question.outputs[0].answer for question in questions} == {None}
    # what a better model would have written, judged by the same call
    rows = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(line) for line in (tmp_path / handover.ANSWERS).read_text().splitlines()]
    for answer, row in zip(answers, rows, strict=True):
        answer["text"] = block(row["solution"])
    (tmp_path / handover.ANSWERS).write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    done = handover.judge_programs(tmp_path, read_problems(), "sample")
    assert all(question.outputs[0].right for question in read_questions(tmp_path, "programs"))
    assert done.tasks[0].data["source"] == "sample" and done.tasks[0].rows == 6


def test_swebench_there_and_back(tmp_path):
    (tmp_path / "i.jsonl").write_text('{"instance_id": "a", "text": "fix"}\n{"instance_id": "b", "text": "mend"}\n')
    result = invoke("swebench", "--data", tmp_path / "i.jsonl", "--out", tmp_path / "o", "--max-tokens", "8")
    assert result.exit_code == 0 and "2 predictions, 2 of them without a patch" in result.output
    assert [
        json.loads(line)["instance_id"] for line in (tmp_path / "o/predictions.jsonl").read_text().splitlines()
    ] == ["a", "b"]
    report = {"total_instances": 500, "resolved_ids": ["a"], "incomplete_ids": []}
    (tmp_path / "r.json").write_text(json.dumps(report))
    assert (
        "swebench: 50.0 % of 2 right"
        in invoke("swebench", "--out", tmp_path / "o", "--judged", tmp_path / "r.json").output
    )
    assert read_evaluation(tmp_path / "o").tasks[0].rows == 500
    refused = invoke("codeforces", "--out", tmp_path / "o", "--judged", tmp_path / "r.json")
    assert refused.exit_code == 2 and "found answers to swebench, wanted codeforces" in refused.output


def test_codeforces_there_and_back(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "1A", "statement": "x"}\n{"problem": "1B", "statement": "y"}\n')
    out = tmp_path / "o"
    assert invoke("codeforces", "--data", tmp_path / "p.jsonl", "--out", out, "--max-tokens", "8").exit_code == 0
    judged = tmp_path / "j.jsonl"
    judged.write_text(
        '{"problem": "1A", "rating": 900, "solved": true}\n{"problem": "1B", "rating": 1300, "solved": false}\n'
    )
    assert "rating 1100;" in invoke("codeforces", "--out", out, "--judged", judged).output
    assert read_evaluation(out).tasks[0].harness == {"rating": 1100}  # no table, no percentile
    (tmp_path / "t.csv").write_text("rating,percentile\n0,0\n2000,90\n")
    invoke("codeforces", "--out", out, "--judged", judged, "--ratings", tmp_path / "t.csv")
    assert read_evaluation(out).tasks[0].harness == {"rating": 1100, "percentile": 49.5}
    judged.write_text('{"problem": "9Z", "rating": 900, "solved": true}\n')
    assert (
        "found a verdict on '9Z', which was not asked" in invoke("codeforces", "--out", out, "--judged", judged).output
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["swebench"], "found no --data"),
        (["programs", "--judged", "x"], "found --judged, which programs have no use for"),
        (["swebench", "--judged", "x"], "found no asked.json"),
    ],
)
def test_predict_refuses(tmp_path, arguments, message):
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 2 and message in result.output
