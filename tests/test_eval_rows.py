"""Rows that no benchmark may hold: each is named by file, row, field, found and wanted before a model is loaded."""

import json
import re

import pytest
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.eval.benchmarks import QUESTIONS, SCORERS
from modeling_deepseek_moe.eval.data import SOURCES
from modeling_deepseek_moe.eval.protocols import read_protocols
from modeling_deepseek_moe.eval.results import BENCHMARKS

GOOD = {
    "mmlu_pro": {
        "question_id": 1,
        "question": "q",
        "options": ["1", "2", "3"],
        "answer": "B",
        "cot_content": "",
        "category": "math",
    },
    "math500": {"problem": "p", "solution": "s", "answer": "5", "subject": "Algebra", "unique_id": "a"},
    "math": {"problem": "p", "solution": r"\boxed{5}", "type": "Algebra"},
    "gpqa_diamond": {
        "Question": "q",
        "Correct Answer": "c",
        **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)},
        "Record ID": "r",
        "High-level domain": None,
    },
    **{name: {"problem": "p", "answer": "33", "id": 1} for name in ("aime24", "aime25", "aime26", "hmmt_feb25")},
}
IDS = {"mmlu_pro": "question_id", "math500": "unique_id", "gpqa_diamond": "Record ID"} | dict.fromkeys(
    ("aime24", "aime25", "aime26", "hmmt_feb25"), "id"
)


def ask(folder, benchmark, *rows):
    (folder / f"{benchmark}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shots = {"shots": 0} if benchmark == "mmlu_pro" else {}
    return QUESTIONS[benchmark](data=folder, **shots)[0]


def test_every_benchmark_has_rows_questions_a_scorer_and_a_name():
    assert GOOD.keys() == QUESTIONS.keys() == SOURCES.keys() == SCORERS.keys()
    asked = {name for suite in read_protocols().values() for name in suite.tasks}
    assert asked == QUESTIONS.keys() <= BENCHMARKS.keys()
    assert all(source.identity or name == "math" for name, source in SOURCES.items())


@pytest.mark.parametrize("benchmark", GOOD)
def test_good_rows_are_taken(tmp_path, benchmark):
    (question,) = ask(tmp_path, benchmark, GOOD[benchmark])
    assert question["gold"] in ("B", "5", "33", *"ACD") and question["id"]


@pytest.mark.parametrize("benchmark", IDS)
def test_an_id_twice(tmp_path, benchmark):
    name, row = IDS[benchmark], GOOD[benchmark]
    message = (
        rf"{benchmark}.jsonl: row 3: ({name}|problem_idx): found {row[name]!r}, wanted an id of its own: row 1 has"
    )
    with pytest.raises(ValueError, match=message):
        ask(tmp_path, benchmark, row, row | {name: "other"}, row)


BAD = [None, "", "  ", [], {}, True, float("nan"), "\ud800"]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize(
    "benchmark, field",
    [
        *(("mmlu_pro", field) for field in ("question_id", "question", "options", "answer", "category")),
        *(("math500", field) for field in ("problem", "answer", "unique_id")),
        *(("math", field) for field in ("problem", "solution")),
        *(("gpqa_diamond", field) for field in ("Question", "Correct Answer", "Incorrect Answer 2", "Record ID")),
        *(("aime25", field) for field in ("problem", "answer", "id")),
        *(("hmmt_feb25", field) for field in ("problem", "answer")),
    ],
)
def test_what_is_missing_is_named(tmp_path, benchmark, field, value):
    good = GOOD[benchmark]
    other = good | ({IDS[benchmark]: "other"} if benchmark in IDS else {})
    with pytest.raises(ValueError, match=rf"{benchmark}.jsonl: row 2: ({field}|problem_idx): found .*, wanted "):
        ask(tmp_path, benchmark, other, good | {field: value})


@pytest.mark.parametrize(
    "benchmark, changes, message",
    [
        ("aime24", {"answer": 1000}, "answer: found 1000, wanted a whole number from 0 to 999"),
        ("aime24", {"answer": -1}, "answer: found -1"),
        ("aime24", {"answer": "33.5"}, "answer: found '33.5'"),
        ("aime24", {"answer": "None"}, "answer: found 'None'"),
        ("aime24", {"answer": "x"}, "answer: found 'x'"),
        ("math500", {"answer": "nan"}, "answer: found 'nan', wanted the answer"),
        ("hmmt_feb25", {"answer": "N/A"}, "answer: found 'N/A'"),
        ("mmlu_pro", {"answer": 1}, "answer: found 1, wanted one of its 3 options, 'ABC'"),
        ("mmlu_pro", {"answer": "b"}, "answer: found 'b'"),
        ("mmlu_pro", {"answer": "AB"}, "answer: found 'AB'"),
        ("mmlu_pro", {"answer_index": 2}, "answer_index: found 2, wanted 1, the place of the answer B"),
        ("mmlu_pro", {"options": ["N/A", "2", "3"]}, "options: found 'N/A', wanted none before the answer B"),
        ("mmlu_pro", {"options": ["1"]}, "wanted 2 to 10 options"),
        ("mmlu_pro", {"options": ["1", "N/A"]}, "wanted 2 to 10 options"),
        ("mmlu_pro", {"options": list("abcdefghijk")}, "wanted 2 to 10 options"),
        ("mmlu_pro", {"options": ["1", None, "3"]}, "wanted text or a number as option 2"),
        ("mmlu_pro", {"options": {"A": "1", "B": "2"}}, "wanted a list"),
        ("math", {"solution": r"\boxed{5"}, "wanted a solution with its answer in"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, benchmark, changes, message):
    with pytest.raises(ValueError, match=re.escape(f"{benchmark}.jsonl: row 1: ") + f".*{re.escape(message)}"):
        ask(tmp_path, benchmark, GOOD[benchmark] | changes)


@pytest.mark.parametrize(
    "benchmark, changes, gold",
    [
        ("aime24", {"answer": 33}, "33"),
        ("aime24", {"answer": "033"}, "033"),
        ("aime25", {"answer": r"336^\circ"}, r"336^\circ"),  # so in a published copy
        ("hmmt_feb25", {"answer": r"\frac{\sqrt{3}}{2}"}, r"\frac{\sqrt{3}}{2}"),
        ("hmmt_feb25", {"answer": 103}, "103"),
        ("math500", {"answer": r"\text{Evelyn}"}, r"\text{Evelyn}"),
        ("mmlu_pro", {"options": ["1", "2", "N/A"], "answer_index": 1}, "B"),
        ("mmlu_pro", {"options": [1, 2.5, "none"]}, "B"),
    ],
)
def test_what_people_have_is_taken(tmp_path, benchmark, changes, gold):
    (question,) = ask(tmp_path, benchmark, GOOD[benchmark] | changes)
    assert question["gold"] == gold


def test_the_row_is_that_of_the_file(tmp_path):
    good, file = GOOD["aime24"], tmp_path / "aime24.jsonl"
    file.write_text(
        "\ufeff" + json.dumps(good) + "\n\n\n" + json.dumps(good | {"id": 2, "answer": None}) + "\n", "utf-8"
    )
    with pytest.raises(ValueError, match=r"aime24.jsonl: row 4: answer: found null"):
        QUESTIONS["aime24"](data=tmp_path)
    file.unlink()
    csv = tmp_path / "aime24.csv"
    csv.write_text("id,problem,answer\n1,p,33\n2,p, with a comma,34\n")
    with pytest.raises(ValueError, match=r"aime24.csv: row 2: found 4 fields, wanted the 3 of the header"):
        QUESTIONS["aime24"](data=tmp_path)
    csv.write_text("id,problem,answer\n1,p,33\n2,p\n")
    with pytest.raises(ValueError, match=r"aime24.csv: row 2: found 2 fields, wanted the 3 of the header"):
        QUESTIONS["aime24"](data=tmp_path)


def test_the_command_looks_at_rows_and_examples_before_it_loads_a_model(tmp_path):
    (tmp_path / "math500.jsonl").write_text(json.dumps(GOOD["math500"] | {"answer": None}) + "\n")
    command = ["eval", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--tasks", "math500"])
    assert result.exit_code == 2 and "row 1: answer: found null" in result.output
    (tmp_path / "mmlu_pro.jsonl").write_text(json.dumps(GOOD["mmlu_pro"]) + "\n")
    (tmp_path / "mmlu_pro_validation.jsonl").write_text(json.dumps(GOOD["mmlu_pro"]) + "\n")
    result = CliRunner().invoke(app, [*command, "--tasks", "mmlu_pro", "--shots", "1"])
    assert result.exit_code == 2 and "example 1: cot_content: found none" in result.output
    assert not (tmp_path / "out").exists()
