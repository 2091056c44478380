"""Questions: where they come from, what bad data says, and the prompts made of them."""

import json
import re
import string

import pytest

from modeling_deepseek_moe.cli.eval import Suite
from modeling_deepseek_moe.eval import benchmarks, prompts
from modeling_deepseek_moe.eval.data import SOURCES, load_rows
from modeling_deepseek_moe.eval.protocols import protocol, read_protocols

MMLU = {
    "question_id": 7,
    "question": "What is 2 + 2?",
    "options": ["3", "4", "N/A"],
    "answer": "B",
    "answer_index": 1,
    "cot_content": "",
    "category": "math",
    "src": "own",
}
SHOT = MMLU | {
    "question": "What is 1 + 1?",
    "options": ["1", "2"],
    "cot_content": "A: Let's count. The answer is (B).",
}
MATH = {
    "problem": "1+1?",
    "solution": "\\boxed{2}",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "t/1",
}
GPQA = {
    "Record ID": "rec1",
    "Question": "Which?",
    "Correct Answer": "right\n",
    **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    "High-level domain": "Physics",
}


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name", ["math500.jsonl", "math500_test.jsonl", "math500/test.json", "math500.csv", "math500.parquet"]
)
def test_every_file_kind_gives_the_same_rows(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    rows = [MATH | {"level": "1"}, MATH | {"level": "1", "unique_id": "t/2", "problem": 'a "quoted", one'}]
    if name.endswith("jsonl"):
        write(file.parent, file.name, rows)
    elif name.endswith("json"):
        file.write_text(json.dumps(rows))
    elif name.endswith("csv"):
        import csv

        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(MATH))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    got, facts = load_rows("math500", "test", tmp_path)
    assert [row["problem"] for row in got] == ["1+1?", 'a "quoted", one']
    assert facts["source"] == "folder" and facts["path"] == str(file)
    assert (
        facts["sha256"] == load_rows("math500", "test", write(tmp_path / "again", "math500.jsonl", rows))[1]["sha256"]
    )


def test_bad_data_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*wanted a folder, 'hub' or 'sample'"):
        load_rows("math500", "test", tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no test rows of math500, wanted math500/test.jsonl.*math500.jsonl"):
        load_rows("math500", "test", tmp_path)
    folder = write(tmp_path / "columns", "math500.jsonl", [MATH, {"problem": "x"}])
    with pytest.raises(ValueError, match=r"math500.jsonl: row 2: found columns \['problem'\], wanted 'solution'"):
        load_rows("math500", "test", folder)
    with pytest.raises(ValueError, match=r"no rows, wanted at least one"):
        load_rows("math500", "test", write(tmp_path / "empty", "math500.jsonl", []))
    (tmp_path / "empty" / "math500.jsonl").write_text('{"problem": "x"}\n{"problem": ')
    with pytest.raises(ValueError, match=r"math500.jsonl: line 2: not JSON"):
        load_rows("math500", "test", tmp_path / "empty")
    (tmp_path / "empty" / "math500.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"row 1: found list, wanted an object"):
        load_rows("math500", "test", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"ships no rows of gpqa_diamond"):
        load_rows("gpqa_diamond", "test", "sample")


def test_without_network_the_hub_names_the_ways_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub (offline mode is enabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConnectionError, match=r"cannot be fetched from the Hub.*--data FOLDER.*--data sample"):
        load_rows("mmlu_pro")


def test_a_gated_data_set_says_how_to_get_in(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset is a gated dataset on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(PermissionError, match=r"Idavidrein/gpqa is gated: accept its terms at https.*HF_TOKEN"):
        load_rows("gpqa_diamond")
    with pytest.raises(FileNotFoundError, match=r"not found on the Hub at revision"):
        load_rows("math500")


@pytest.mark.parametrize("answer", ["C", "K", "", None, "b"])
def test_an_answer_that_is_no_option_is_refused(tmp_path, answer):
    folder = write(tmp_path, "mmlu_pro.jsonl", [MMLU | {"answer": answer}])
    with pytest.raises(
        ValueError, match=r"mmlu_pro.jsonl: row 1: answer: found .*, wanted one of its 2 options, 'AB'"
    ):
        benchmarks.mmlu_pro(folder, shots=0)


def test_options_that_are_no_list_are_refused(tmp_path):
    folder = write(tmp_path, "mmlu_pro.jsonl", [MMLU | {"options": "['3', '4']"}])
    with pytest.raises(ValueError, match=r"row 1: options: found .*, wanted a list"):
        benchmarks.mmlu_pro(folder, shots=0)


def test_mmlu_pro_examples_are_of_the_category_and_in_order(tmp_path):
    shots = [
        SHOT | {"question_id": i, "question": f"shot {i}", "category": "math" if i % 2 else "law"} for i in range(8)
    ]
    write(tmp_path, "mmlu_pro_validation.jsonl", shots)
    folder = write(tmp_path, "mmlu_pro_test.jsonl", [MMLU])
    questions, _ = benchmarks.mmlu_pro(folder, shots=3)
    prompt = questions[0]["prompt"]
    assert re.findall(r"shot \d", prompt) == ["shot 1", "shot 3", "shot 5"]
    with pytest.raises(ValueError, match=r"found 4 examples of 'math', wanted 5"):
        benchmarks.mmlu_pro(folder, shots=5)


def test_mmlu_pro_prompt_is_the_authors():
    assert prompts.mmlu_pro(MMLU | {"options": ["3", "4"]}, [SHOT]) == (
        "The following are multiple choice questions (with answers) about math. Think step by step and then output the "
        'answer in the format of "The answer is (X)" at the end.\n\n'
        "Question: What is 1 + 1?\nOptions: A. 1\nB. 2\nAnswer: Let's count. The answer is (B).\n\n"
        "Question: What is 2 + 2?\nOptions: A. 3\nB. 4\nAnswer: Let's think step by step."
    )
    assert prompts.mmlu_pro_letters(MMLU | {"options": ["3", "4"]}, [SHOT]).endswith(
        "Answer: B\n\nQuestion: What is 2 + 2?\nOptions: A. 3\nB. 4\nAnswer:"
    )


def test_gpqa_options_are_permuted_the_same_way_each_time(tmp_path):
    folder = write(tmp_path, "gpqa_diamond.jsonl", [GPQA | {"Record ID": f"rec{i}"} for i in range(12)])
    questions, _ = benchmarks.gpqa_diamond(folder)
    assert questions == benchmarks.gpqa_diamond(folder)[0]
    assert len({tuple(question["options"]) for question in questions}) > 3
    for question in questions:
        assert question["options"]["ABCD".index(question["gold"])] == "right"
        assert f"\n{question['gold']}) right" in question["prompt"]


def test_math_takes_the_gold_from_the_solution(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}.", "type": "Algebra"}]
    questions, _ = benchmarks.math(write(tmp_path, "math.jsonl", rows))
    assert questions[0]["gold"] == "\\frac{1}{2}"
    assert questions[0]["prompt"].count("Problem:\n") == 5 and questions[0]["prompt"].endswith(
        "Problem:\np\n\nSolution:"
    )
    with pytest.raises(
        ValueError, match=r"math.jsonl: row 1: solution: found 'half', wanted a solution with its answer in .boxed"
    ):
        benchmarks.math(write(tmp_path, "math.jsonl", [rows[0] | {"solution": "half"}]))


@pytest.mark.parametrize("benchmark, load", [("mmlu_pro", benchmarks.mmlu_pro), ("math500", benchmarks.math500)])
def test_the_rows_that_ship_are_sound(benchmark, load):
    questions, facts = load("sample")
    assert facts["source"] == "sample" and len(questions) >= 20
    assert len({question["id"] for question in questions}) == len(questions)
    for question in questions:
        assert question["gold"] and question["question"] and question["category"]


def test_each_source_is_pinned():
    for source in SOURCES.values():
        assert len(source.revision) == 40 and set(source.revision) <= set(string.hexdigits.lower())


def test_every_protocol_field_is_documented_or_assumed(tmp_path):
    for name, suite in read_protocols().items():
        fields = [*suite.shared.values(), *(field for fields in suite.fields.values() for field in fields.values())]
        assert suite.name == name and len(fields) > 8
        for field in fields:
            assert field.status in ("documented", "assumed") and len(field.source) > 2
    with pytest.raises(ValueError, match=r"found 'v4', wanted one of v3-chat, r1, v3.2, k2.5, v3-base"):
        protocol("v4")
    bad = tmp_path / "p.yaml"
    bad.write_text(
        "x: {about: y, chat_template: {value: true}, system_prompt: 1, template_args: 1, prefill: 1, thinking: 1, tasks: {}}"
    )
    with pytest.raises(ValueError, match=r"x.chat_template: found .'value'., wanted 'value' and one of"):
        read_protocols(bad)


def test_the_command_offers_every_suite():
    assert [suite.value for suite in Suite] == list(read_protocols())
