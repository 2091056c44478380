"""Extraction and verdicts, against recorded outputs where those are at hand."""

import importlib.util
import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from modeling_deepseek_moe.eval import benchmarks, extraction, math_scoring

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MATH = replace(benchmarks.SCORERS["math500"], stock=None)
needs_math = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs math-verify")


def rows(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs {name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_right(gold: str, text: str) -> bool:
    """As a run judges an answer to MATH."""
    return benchmarks.judge(MATH, {"gold": gold}, text)["right"]


def test_mmlu_pro_chain_on_recorded_outputs():
    samples = rows("mmlu_pro_280_replay.jsonl")
    expected = json.loads((SHARED / "mmlu_pro_280_expected.json").read_text())
    for model, want in expected.items():
        outputs = [(row["answer"], row["recorded"][model]) for row in samples]
        stock = sum(extraction.stock_mmlu_pro_letter(o["output"]) == gold for gold, o in outputs)
        chain = [(gold, extraction.mmlu_pro_letter(o["output"]), o["pred"]) for gold, o in outputs]
        assert stock == want["stock_lm_eval_regex_correct"]
        assert sum(got == gold for gold, got, _ in chain) == want["three_stage_correct"]
        assert sum(got == pred for _, got, pred in chain) >= want["pred_equals_three_stage"]


def authors_chain(text):
    """The authors' own patterns, backtracking and all."""
    text = text.replace("**", "")
    patterns = ((r"answer is \(?([A-J])\)?", 0), (r".*[aA]nswer:\s*([A-J])", 0), (r"\b([A-J])\b(?!.*\b[A-J]\b)", re.S))
    for pattern, flags in patterns:
        if match := re.search(pattern, text, flags):
            return match[1]
    return None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is (C).",
        "**The answer is** (D)",
        "answer: A or Answer: B\nanswer: C",
        "answer: Answer: B",
        "answer:\n\nE then answer: nothing",
        "Answer: x\nanswer: F",
        "$\\boxed{G}$ and I",
        "so (A) or B, finally (H)!",
        "Ab cD",
    ],
)
def test_chain_equals_the_authors_patterns(text):
    assert extraction.mmlu_pro_letter(text) == authors_chain(text)


def test_chain_equals_the_authors_patterns_on_cuts_of_recorded_outputs():
    for row in rows("mmlu_pro_280_replay.jsonl"):
        for recorded in row["recorded"].values():
            text = recorded["output"]
            for part in (text[: len(text) // 2], text[-300:], text.replace("answer is", "Answer:")):
                assert extraction.mmlu_pro_letter(part) == authors_chain(part)


@pytest.mark.parametrize(
    "text, want",
    [
        (r"$\boxed{5}$", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 9.", "9"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{a}}} b", "a"),
        (r"\boxed{{a}{{b}}}", "{a}{{b}}"),
        (r"\boxed{}", ""),
        ("no box", None),
        ("\\boxed", None),
    ],
)
def test_boxed(text, want):
    assert extraction.boxed(text) == want


@pytest.mark.parametrize(
    "text, want", [("Answer: $B$", "B"), ("answer : c\nAnswer: D", "C"), ("Answer: E", None), ("", None)]
)
def test_simple_evals_letter(text, want):
    assert extraction.simple_evals_letter(text) == want


def test_thinking_is_not_the_answer():
    assert extraction.after_thinking("<think>answer is (A)</think>\n\nB") == "B"
    assert extraction.after_thinking("<think>answer is (A), or") == ""


@pytest.mark.parametrize("piece", ["answer is ", "Answer: ", "answer:\n", "A ", "\\boxed{", "{", "\\", "**", " ", "a"])
def test_linear_in_the_text(piece):
    text = (piece * (2**20 // len(piece)))[: 2**20]
    for extract in (
        extraction.mmlu_pro_letter,
        extraction.stock_mmlu_pro_letter,
        extraction.simple_evals_letter,
        extraction.boxed,
        lambda text: extraction.boxed("\\boxed{" + text),
        math_scoring.math_answer,
        extraction.after_thinking,
    ):
        start = time.process_time()
        extract(text)
        assert time.process_time() - start < 5, (piece, extract)  # quadratic time would be minutes


@needs_math
def test_math_verdicts_equal_the_recorded():
    equal = total = 0
    for row in rows("math_cot100x8_graded.jsonl"):
        for text, verdict in zip(row["responses"], row["score"], strict=True):
            equal += is_right(row["answer"], text) == bool(verdict)
            total += 1
    assert (total, equal >= 799) == (800, True), equal


@needs_math
def test_math500_gold_equals_itself():
    golds = [row["answer"] for row in rows("math500.jsonl")]
    assert len(golds) == 500
    assert [gold for gold in golds if not is_right(gold, f"So it is $\\boxed{{{gold}}}$.")] == []


@needs_math
@pytest.mark.parametrize(
    "gold, text, want",
    [
        ("5", r"$\boxed{5}$", True),
        ("25\\%", r"\boxed{25\%}", True),
        ("\\frac{1}{2}", r"\boxed{0.5}", True),
        ("[-2,2]", r"\boxed{[-2, 2]}", True),
        ("5", r"\boxed{6}", False),
        ("5", "5", False),
        ("5", r"\boxed{" + "5" * 3000 + "}", False),
    ],
)
def test_math_verdict(gold, text, want):
    assert is_right(gold, text) is want


def scanned(text):
    """The content of a box, character by character."""
    depth, position = 1, len("\\boxed{")
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[len("\\boxed{") : position].strip()
        position += 1
    return None


def test_boxes_equal_a_scan_by_character():
    draw, found = random.Random(0), 0
    for _ in range(20_000):
        pieces = draw.choices(["{", "}", "\\", "a", "{}", "\\{", " ", "{b}"], k=draw.randint(0, 12))
        text = "\\boxed{" + "".join(pieces)
        assert extraction.boxed(text) == scanned(text), text
        found += scanned(text) is not None
    assert found > 5000
