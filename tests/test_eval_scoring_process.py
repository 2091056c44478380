"""Scoring in a process of its own: its verdicts are those of the module, and no answer outlasts its time, in a thread either."""

import logging
import os
import shutil
import signal
import sys
import threading

import pytest

pytest.importorskip("math_verify")

from modeling_deepseek_moe.eval import benchmarks, scoring_process
from modeling_deepseek_moe.eval.math.scoring import is_equal, math_answer
from modeling_deepseek_moe.eval.scoring_process import ScoringProcess


@pytest.fixture(scope="module")
def scoring():
    made = ScoringProcess(seconds=1)
    yield made
    made.close()


def in_a_thread(function, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize(
    "gold, answer", [("5", "5"), (r"\frac12", "0.5"), ("5", "6"), ("[-2,2]", "[-2, 2]"), ("", "x")]
)
def test_verdicts_are_the_modules(scoring, gold, answer):
    want = is_equal(gold, answer)
    assert scoring.call("is_equal", gold, answer) is want
    assert in_a_thread(scoring.call, "is_equal", gold, answer) == [want]


@pytest.mark.parametrize(
    "text", [r"so \boxed{5}", "none", r"\boxed{é" + "}" + "\n line " * 50_000 + r"\boxed{\text{漢}}"]
)
def test_answers_are_the_modules(scoring, text):
    assert scoring.call("math_answer", text) == math_answer(text)


@pytest.mark.parametrize("endless", ["9^{9^{9^9}}", r"\binom{10^9}{5 \cdot 10^8}", "5^{" * 300 + "5" + "}" * 300])
def test_an_endless_answer_is_no_match_and_the_next_one_is_scored(scoring, endless, caplog):
    with caplog.at_level(logging.WARNING):
        found = in_a_thread(scoring.call, "is_equal", "5", endless)
    assert found in ([None], [False]) and (found == [False] or "counts as no match" in caplog.text)
    assert in_a_thread(scoring.call, "is_equal", "1/2", "0.5") == [True]


def test_threads_take_turns(scoring):
    pairs = [(str(i), str(i + i % 2)) for i in range(40)]
    found = {}
    threads = [
        threading.Thread(target=lambda pair=pair: found.__setitem__(pair, scoring.call("is_equal", *pair)))
        for pair in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {pair: pair[0] == pair[1] for pair in pairs}


def test_a_process_that_was_ended_is_started_again(scoring):
    assert scoring.call("is_equal", "1", "1") is True
    os.kill(scoring._running.pid, signal.SIGKILL)
    assert scoring.call("is_equal", "1", "1.0") is True


def test_what_fails_each_time_counts_as_no_match(scoring, caplog):
    with caplog.at_level(logging.WARNING):
        assert scoring.call("math_answer", 1) is None  # no text: the module cannot read it
    assert "failed and counts as no match" in caplog.text
    assert scoring.call("is_equal", "1", "1") is True


def test_a_benchmarks_verdict_in_a_thread(monkeypatch, scoring):
    monkeypatch.setattr(scoring_process, "_process", lambda owner: scoring)
    question = {"gold": "5"}
    for text, right in ((r"\boxed{5}", True), (r"\boxed{9^{9^{9^9}}}", False), (r"\boxed{\frac{10}{2}}", True)):
        (verdict,) = in_a_thread(benchmarks.judge, benchmarks.SCORERS["hmmt_feb25"], question, text)
        assert verdict["right"] is right


def test_a_process_that_does_not_start_is_an_error(monkeypatch):
    made = ScoringProcess()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="the process that scores answers does not start"):
        made.call("is_equal", "1", "1")
    made.close()


def test_a_missing_library_is_named(monkeypatch, scoring):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="found no math-verify, wanted it to score MATH"):
        scoring.call("is_equal", "1", "1")


@pytest.mark.parametrize(
    "benchmark, gold, answer",
    [
        ("aime25", r"336^\circ", "336"),
        ("aime26", "033", "33"),
        ("hmmt_feb25", "103", "103"),
        ("hmmt_feb25", r"\frac{1}{576}", "1/576"),
        ("hmmt_feb25", r"9\sqrt{23}/23", r"\frac{9}{\sqrt{23}}"),
        ("hmmt_feb25", r"8\sqrt{10}", r"\sqrt{640}"),
        ("hmmt_feb25", r"1-\frac{2}{\pi}", r"\frac{\pi-2}{\pi}"),
        ("hmmt_feb25", r"2^{25} \cdot 26!", r"26! \cdot 2^{25}"),
    ],
)
def test_answers_of_contests(benchmark, gold, answer):
    scorer = benchmarks.SCORERS[benchmark]
    assert benchmarks.judge(scorer, {"gold": gold}, f"so $\\boxed{{{answer}}}$.")["right"]
    assert not benchmarks.judge(scorer, {"gold": gold}, r"so \boxed{7}.")["right"]
