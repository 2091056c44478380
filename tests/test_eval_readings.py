"""How answers are read: the benchmark's own reading, the others next to it, and what a report draws and says of them."""

import json
import random
from pathlib import Path

import pytest
from eval_harness import small_model, tokenizer
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from report_cases import make_task, write_run

from modeling_deepseek_moe.eval import benchmarks, extraction, letters, report
from modeling_deepseek_moe.eval.benchmarks import SCORERS, judge, judge_repeat
from modeling_deepseek_moe.eval.report.explorer import MARK_FLAGS, index
from modeling_deepseek_moe.eval.report.figure import figures
from modeling_deepseek_moe.eval.report.gather import gather
from modeling_deepseek_moe.eval.results import Output, Question, read_questions
from modeling_deepseek_moe.eval.run import TASKS, Changes, evaluate

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers" / "letters.jsonl").read_text().splitlines()]
PRO = [row for row in ROWS if "chain" in row]
GPQA = [row for row in ROWS if "simple_evals" in row]
OPTIONS = {"id": "1", "gold": "C", "options": list("pqrstuvwxy")}


@pytest.mark.parametrize("row", PRO, ids=lambda row: row["text"][:24])
def test_letters_of_mmlu_pro(row):
    text = row["text"]
    assert extraction.stock_mmlu_pro_letter(text) == row["stock"]
    assert extraction.mmlu_pro_letter(text) == row["chain"]
    assert letters.last_letter(text) == row["last"]
    assert letters.lenient_letter(text, row["letters"]) == row["lenient"]
    assert list(letters.marks({}, text)) == row["marks"]


@pytest.mark.parametrize("row", GPQA, ids=lambda row: row["text"][:24])
def test_letters_of_gpqa(row):
    assert extraction.simple_evals_letter(row["text"]) == row["simple_evals"]
    assert letters.lenient_letter(row["text"], "ABCD") == row["lenient"]


def test_lm_evals_task_misses_what_the_authors_chain_reads():
    """The reason why answers are not read by lm-eval's own task, on rows of this project."""
    wanted = [row for row in PRO if row["lenient"]]
    found = {name: sum(row[name] == row["lenient"] for row in wanted) for name in ("stock", "chain", "last")}
    assert (len(wanted), found) == (10, {"stock": 2, "chain": 7, "last": 9})
    lost = [row for row in GPQA if row["lenient"] and row["simple_evals"] != row["lenient"]]
    assert len(lost) == 57


def test_a_judged_answer_has_every_reading():
    judged = judge(SCORERS["mmlu_pro"], OPTIONS, "The answer is (A). No: the answer is (C).")
    assert (judged["answer"], judged["right"], judged["marks"]) == ("A", False, ("several",))
    assert {name: one["right"] for name, one in judged["readings"].items()} == {
        "published": False,
        "last": True,
        "lenient": True,
    }
    judged = judge(SCORERS["gpqa_diamond"], {"gold": "B", "options": list("wxyz")}, "Answer: **B**")
    assert (judged["answer"], judged["readings"]) == (None, {"lenient": {"answer": "B", "right": True}})
    thoughts = judge(SCORERS["mmlu_pro"], OPTIONS, "the answer is (C)</think>So I guess.", thinking=True)
    assert thoughts["answer"] == "I" and thoughts["marks"] == ("word", "chance")
    assert judge(SCORERS["math500"], {"gold": "5"}, r"\boxed{5}")["readings"] == {}


def test_the_published_reading_draws_letters_evenly_and_the_same_each_time():
    texts = [f"nothing was found, {i}" for i in range(4000)]
    drawn = [letters.published_letter(OPTIONS | {"options": list("wxyz")}, text) for text in texts]
    assert drawn == [letters.published_letter(OPTIONS | {"options": list("wxyz")}, text) for text in texts]
    assert all(900 < drawn.count(letter) < 1100 for letter in "ABCD")
    assert letters.published_letter(OPTIONS, "**The answer is (J)**") == "J"


def questions_of(texts, benchmark="mmlu_pro", gold="C", **more):
    made = []
    for i, text in enumerate(texts):
        question = OPTIONS | {"id": str(i), "gold": gold} | more
        outputs = (Output(text=text, **judge(SCORERS[benchmark], question, text)),)
        made.append(Question(id=str(i), question=f"q{i}", prompt="p", gold=gold, outputs=outputs))
    return made


def test_a_report_draws_what_was_read_as_published(tmp_path):
    texts = ["The answer is (C)."] * 30 + [r"\boxed{C}"] * 20 + ["the answer is (A), no, answer is (C)"] * 10
    texts += ["I do not know"] * 5
    run = write_run(tmp_path / "run", [(make_task(rows=12_032), questions_of(texts))])
    assert read_questions(run, "dsv3_mmlu_pro") == questions_of(texts)
    (task,) = gather([run])[0].tasks
    assert task.scores.score == pytest.approx(50 / 65)
    by_chance = sum(
        letters.published_letter(OPTIONS | {"id": str(i)}, texts[i]) == "C" for i in (*range(30, 50), *range(60, 65))
    )
    assert task.readings["published"].score == pytest.approx((30 + by_chance) / 65)
    assert task.readings["last"].score == pytest.approx(60 / 65)
    assert task.marks == {"several": 10, "word": 5, "chance": 25}
    bar = next(bar for group in figures(gather([run]))[0].groups for bar in group.bars if bar.measured)
    assert bar.value == pytest.approx(100 * (30 + by_chance) / 65) and bar.low < bar.value < bar.high
    page = report.write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    for shown in (
        "The same answers, read otherwise",
        "read as published",
        "as its published figures were",
        "10 of 65",
    ):
        assert shown in page, shown
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["runs"][0]["tasks"]["dsv3_mmlu_pro"]
    assert numbers["readings"]["last"]["score"] == pytest.approx(60 / 65) and numbers["marks"]["several"] == 10
    flags = [row[-1] for row in index(gather([run]), [])["runs"][0]["tasks"][0]["rows"]]
    assert [sum(bool(flag & MARK_FLAGS[mark]) for flag in flags) for mark in ("several", "word", "chance")] == [
        10,
        5,
        25,
    ]
    assert all(f'value="{mark}"' in page for mark in MARK_FLAGS)


def test_sample_rows_and_likelihoods_keep_their_score(tmp_path):
    texts = [r"\boxed{C}"] * 20
    run = write_run(tmp_path / "run", [(make_task(source="sample"), questions_of(texts))])
    (task,) = gather([run])[0].tasks
    assert task.as_published is None and task.headline[0] == 100
    plain = [Question(id="1", question="q", prompt="p", gold="A", outputs=(Output(text="", answer="A", right=True),))]
    run = write_run(tmp_path / "plain", [(make_task(), plain)])
    (task,) = gather([run])[0].tasks
    assert (task.readings, task.marks, task.headline[0]) == ({}, {}, 100)
    page = report.write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    assert "read otherwise" not in page and "read as published" not in page


def write_gpqa(folder, count):
    row = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)} | {
        "Correct Answer": "right",
        "High-level domain": "x",
    }
    rows = [row | {"Question": f"Question {i}?", "Record ID": f"rec{i}"} for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpqa_diamond.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_gpqa_orders_are_those_of_simple_evals(tmp_path):
    """simple-evals repeats the list of examples, and then draws an order for each from one generator."""
    questions, _ = benchmarks.gpqa_diamond(write_gpqa(tmp_path, 5), k=3)
    draw = random.Random(0)
    upstream = [draw.sample(range(4), 4) for _ in range(5 * 3)]
    given = ["right", "wrong 1", "wrong 2", "wrong 3"]
    for number, question in enumerate(questions):
        for repeat in range(3):
            shown = [given[i] for i in upstream[5 * repeat + number]]
            assert question["prompts"][repeat].endswith(
                "\n".join(f"{a}) {b}" for a, b in zip("ABCD", shown, strict=True))
            )
            first = dict(zip(question["options"], "ABCD", strict=True))
            assert question["orders"][repeat] == "".join(first[option] for option in shown)
    assert len({question["orders"] and tuple(question["prompts"]) for question in questions}) == 5


class Knows(LM):
    """Finds the right option where it stands, at every second request of a question."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def generate_until(self, requests):
        self.asked = [request.args[0] for request in requests]
        places = [next(line[0] for line in prompt.splitlines() if line.endswith(") right")) for prompt in self.asked]
        return [f"Answer: {place}" if i % 2 else f"So it is\n**{place}**" for i, place in enumerate(places)]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.mark.parametrize("task, k", [("dsv32_gpqa_diamond", 8), ("dsv3_gpqa_diamond", 1)])
@pytest.mark.slow
def test_every_repeat_through_lm_eval_has_its_order(tmp_path, task, k):
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data": str(write_gpqa(tmp_path, 6))}
    )
    model = Knows()
    end = "</think>" if task.startswith("dsv32") else ""
    model_generate = model.generate_until
    model.generate_until = lambda requests: [end + text for text in model_generate(requests)]
    found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    assert len(model.asked) == 6 * k
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    for sample in samples:
        assert [arguments[0] for arguments in sample["arguments"]] == sample["doc"]["prompts"]
        assert [len(repeats) for repeats in sample["resps"]] == [1] * k
    assert sum(sample["exact_match"] for sample in samples) == 3  # by simple-evals' own reading, every second one
    assert len(set(model.asked)) > 6 * (k > 1)


def test_a_repeat_is_judged_in_the_letters_of_the_first(tmp_path):
    question = benchmarks.gpqa_diamond(write_gpqa(tmp_path, 3), k=4)[0][1]
    for repeat, order in enumerate(question["orders"]):
        place = "ABCD"[order.index(question["gold"])]
        judged = judge_repeat(SCORERS["gpqa_diamond"], question, f"Answer: {place}", repeat)
        assert (judged["answer"], judged["right"]) == (question["gold"], True)
        assert judged["readings"]["lenient"] == {"answer": question["gold"], "right": True}
        other = "ABCD"[(order.index(question["gold"]) + 1) % 4]
        wrong = judge_repeat(SCORERS["gpqa_diamond"], question, f"Answer: {other} ({other})", repeat)
        assert (wrong["answer"], wrong["right"], wrong["stock_right"]) == (order["ABCD".index(other)], False, False)
        assert wrong["stock_answer"] == wrong["answer"]
        assert judged.get("order", "ABCD") == order


def test_a_run_keeps_the_order_and_prompt_of_each_repeat(tmp_path):
    changes = Changes(max_tokens=3, k=3)
    folder = write_gpqa(tmp_path / "data", 3)
    asked = {"suite": "r1", "benchmarks": ["gpqa_diamond"], "data": str(folder), "changes": changes, "limit": 2}
    evaluate(small_model(), tokenizer(), out=tmp_path / "run", **asked)
    wanted, _ = benchmarks.gpqa_diamond(folder, k=3)
    questions = read_questions(tmp_path / "run", "dsr1_gpqa_diamond")
    assert len(questions) == 2
    for question, row in zip(questions, wanted[:2], strict=True):
        assert row["prompts"][0] in question.prompt
        first, *others = question.outputs
        assert (first.prompt, first.order) == (None, None)
        for output, prompt, order in zip(others, row["prompts"][1:], row["orders"][1:], strict=True):
            assert prompt in output.prompt and output.order == order and output.readings.keys() == {"lenient"}
    assert "Options in the order" in report.write_report([tmp_path / "run"], tmp_path / "out").read_text()
