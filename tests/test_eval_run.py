"""A run through lm-eval: its verdicts against the record, its folder, interrupted and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from eval_harness import small_model, tokenizer, write_math
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from recorded import recorded
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.eval import extraction
from modeling_deepseek_moe.eval.benchmarks import SCORERS, judge
from modeling_deepseek_moe.eval.protocols import protocol, read_protocols
from modeling_deepseek_moe.eval.results import read_evaluation, read_questions
from modeling_deepseek_moe.eval.run import TASKS, Changes, evaluate

SHORT = Changes(max_tokens=16)


class Replay(LM):
    """Gives recorded texts, by what is in the prompt."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def generate_until(self, requests):
        return [next(text for part, text in self.texts.items() if part in request.args[0]) for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def through_lm_eval(task, texts, **metadata):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return simple_evaluate(Replay(texts), tasks=[task], task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize("model, stock, ours", [("DeepSeek-Coder-V2", 139, 168), ("gemini-1.5-pro-002", 183, 183)])
def test_recorded_outputs_through_the_whole_harness(tmp_path, model, stock, ours):
    file = recorded("mmlu_pro_280_replay.jsonl")
    (tmp_path / "mmlu_pro.jsonl").write_bytes(file.read_bytes())
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = {row["question"]: row["recorded"][model]["output"] for row in rows}
    results = through_lm_eval("dsv3_mmlu_pro", texts, data=str(tmp_path), shots=0)
    samples = results["samples"]["dsv3_mmlu_pro"]
    assert len(samples) == 280
    assert sum(sample["exact_match"] for sample in samples) == ours
    assert sum(sample["stock"] for sample in samples) == stock
    assert results["results"]["dsv3_mmlu_pro"]["exact_match,all"] == pytest.approx(ours / 280)


def test_thinking_is_no_answer(tmp_path):
    write_math(tmp_path, 3)
    texts = {
        "Ada has 0 pens": "\\boxed{1}</think>so \\boxed{0}",
        "Ada has 1 pens": "\\boxed{1} and on and on",
        "Ada has 2 pens": "\\boxed{2}</think>I do not know",
    }
    samples = through_lm_eval("dsr1_math500", texts, data=str(tmp_path))["samples"]["dsr1_math500"]
    assert [sample["exact_match"] for sample in samples] == [1, 0, 0]
    plain = through_lm_eval("dsv3_math500", texts, data=str(tmp_path))["samples"]["dsv3_math500"]
    assert [sample["exact_match"] for sample in plain] == [1, 1, 1]


@pytest.mark.parametrize("suite", ["r1", "v3.2", "k2.5"])
@pytest.mark.parametrize("benchmark", ["aime25", "aime26", "hmmt_feb25"])
def test_contests_through_lm_eval(tmp_path, suite, benchmark):
    rows = [{"id": 1, "problem": "Sum?", "answer": 33}, {"problem_idx": 2, "problem": "Half?", "answer": "1/2"}]
    if benchmark != "hmmt_feb25":
        rows[1]["answer"] = "2"
    for row in rows:
        row |= {"id": row.get("id", 2), "problem_idx": row.get("problem_idx", 1)}
    (tmp_path / f"{benchmark}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {"Sum?": "\\boxed{2}</think>$\\boxed{33}$", "Half?": "\\boxed{2} is what I think"}
    task = protocol(suite).tasks[benchmark]
    samples = through_lm_eval(task, texts, data=str(tmp_path))["samples"][task]
    assert [sample["exact_match"] for sample in samples] == [1, 0]
    assert len(samples[0]["resps"][0]) == protocol(suite).values(benchmark)["k"]
    assert ("stock" in samples[0]) == (benchmark == "aime25")


@pytest.mark.parametrize(
    "benchmark, question, text, answer, right, stock_right",
    [
        ("math500", {"gold": "5"}, "so $\\boxed{5}$.", "5", True, False),
        ("math500", {"gold": "\\frac12"}, "\\boxed{0.5}", "0.5", True, False),
        ("math500", {"gold": "5"}, "so $5$.", None, False, True),
        ("mmlu_pro", {"gold": "C"}, "$\\boxed{C}$", "C", True, False),
        ("mmlu_pro", {"gold": "C"}, "The answer is (C).", "C", True, True),
        ("aime24", {"gold": "204"}, "\\boxed{204}", "204", True, True),
        ("aime24", {"gold": "025"}, "\\boxed{25}", "25", True, False),
        ("gpqa_diamond", {"gold": "B", "options": list("wxyz")}, "Answer: B", "B", True, False),
        ("gpqa_diamond", {"gold": "B", "options": list("wxyz")}, "It is (B)", None, False, True),
        ("math", {"gold": "24"}, "The final answer is $24$. I hope it is correct.", "24", True, None),
        ("math", {"gold": "24"}, "so \\boxed{24}", "24", True, None),
    ],
)
def test_verdicts_beside_lm_evals_own(benchmark, question, text, answer, right, stock_right):
    got = judge(SCORERS[benchmark], question, text)
    assert (got["answer"], got["right"], got["stock_right"]) == (answer, right, stock_right)


def test_minerva_answers():
    assert extraction.minerva_answer("The final answer is $\\frac{1}{2}$. I hope it is correct.") == "\\frac{1}{2}"
    assert extraction.minerva_answer("Final Answer: The final answer is 7") == "7"
    assert extraction.minerva_answer("The final answer is $. I hope it is correct. \\boxed{3}") == "3"
    assert extraction.minerva_answer("nothing") is None
    start = time.perf_counter()
    extraction.minerva_answer("final answer i" * 100_000)
    assert time.perf_counter() - start < 1


def test_task_files_say_what_the_protocols_say():
    checked = 0
    for suite in read_protocols().values():
        for benchmark, task in suite.tasks.items():
            text, fields = (TASKS / benchmark / f"{task}.yaml").read_text(encoding="utf-8"), suite.values(benchmark)
            if "max_tokens" in fields:
                sampled = str(fields["temperature"] > 0).lower()
                wanted = f"do_sample: {sampled}, temperature: {fields['temperature']}, top_p: {fields['top_p']}, "
                assert f"{wanted}max_gen_toks: {fields['max_tokens']}}}" in text, task
                assert f"repeats: {fields['k']}\n" in text, task
                checked += 1
    assert checked == 22


@pytest.mark.slow
def test_a_run_and_its_folder(tmp_path):
    write_math(tmp_path, 5)
    options = {"suite": "r1", "benchmarks": ["math500"], "data": str(tmp_path), "changes": Changes(max_tokens=12, k=3)}
    model, other = tmp_path / "model", tmp_path / "other"
    small_model().save_pretrained(model)
    small_model(initializer_range=0.1).save_pretrained(other)
    first = evaluate(small_model(), tokenizer(), out=tmp_path / "a", folder=model, limit=4, **options)
    assert read_evaluation(tmp_path / "a") == first
    (task,) = first.tasks
    assert task.rows == 5 and task.task == "dsr1_math500" and task.data["source"] == "folder"
    assert task.changed == ("max_tokens 12 instead of 32768", "k 3 instead of 64")
    assert first.protocol["fields"]["prefill"]["status"] == "documented"
    questions = read_questions(tmp_path / "a", "dsr1_math500")
    assert [question.id for question in questions] == [f"own/{i}" for i in range(4)]
    for question in questions:
        assert question.prompt.endswith("<think>\n") and question.prompt.startswith("<bos>")
        assert len({output.text for output in question.outputs}) == 3
        assert all(output.truncated is not None and output.tokens <= 12 for output in question.outputs)
    more = options | {"limit": 5, "batch_size": 1}  # the old ones stay
    evaluate(small_model(), tokenizer(), out=tmp_path / "a", folder=model, **more)
    assert read_questions(tmp_path / "a", "dsr1_math500")[:4] == questions
    with pytest.raises(ValueError, match="answers of another run, with model"):
        evaluate(small_model(initializer_range=0.1), tokenizer(), out=tmp_path / "a", folder=other, **options)


def test_likelihoods_of_letters(tmp_path):
    done = evaluate(
        small_model(),
        tokenizer(),
        out=tmp_path,
        suite="v3-base",
        benchmarks=["mmlu_pro"],
        data="sample",
        limit=3,
        changes=Changes(shots=1),
    )
    questions = read_questions(tmp_path, "dsbase_mmlu_pro")
    for question in questions:
        (output,) = question.outputs
        assert output.answer == max(output.scores, key=output.scores.get)
        assert len(output.scores) == question.prompt.rpartition("Options:")[2].count(". ")
        assert not question.prompt.startswith("<bos>Question")
    right = sum(question.outputs[0].right for question in questions)
    assert done.tasks[0].harness["acc,none"] == pytest.approx(right / 3)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_file(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from modeling_deepseek_moe.cli import main; main()",
        "eval",
        "--tasks",
        "math500",
    ]
    command += ["--batch-size", "1"]
    command += ["--temperature", "0.7", "--k", "2", "--limit", "25"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=env, capture_output=True)
    journal = tmp_path / "killed" / "journal.jsonl"
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 8) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes().count(b"\n")
    assert 8 < kept < 51 and not (tmp_path / "killed" / "evaluation.json").exists()
    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, env=env, capture_output=True)
    name = "samples/dsv3_math500.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "mmlu_pro,humaneval"], "found 'humaneval', wanted some of mmlu_pro, math500"),
        (["--tasks", "math500,math500"], "found 'math500' twice"),
        (["--tasks", ","], "--tasks: found none"),
        (["--data", "/no/such/folder"], "found no such folder"),
        (["--tasks", "gpqa_diamond"], "ships no rows of gpqa_diamond"),
        (["--batch-size", "many"], "--batch-size: found 'many'"),
        (["--max-tokens", "5000"], "max_gen_toks 5000, wanted at most"),
        (["--model", "/no/such/model", "--data", "sample"], "/no/such/model: found no such folder"),
    ],
)
def test_the_command_refuses(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
