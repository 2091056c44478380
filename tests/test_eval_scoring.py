"""Extraction and verdicts, against recorded outputs where those are at hand."""

import importlib.util
import itertools
import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import recorded

from modeling_deepseek_moe.eval import benchmarks, extraction, letters
from modeling_deepseek_moe.eval.math import scoring

ANSWERS = Path(__file__).parent / "answers"
MATH = replace(benchmarks.SCORERS["math500"], stock=None)
needs_math = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs math-verify")


def rows(name):
    return [json.loads(line) for line in recorded(name).read_text(encoding="utf-8").splitlines()]


def own(name):
    """Rows of this project's own making."""
    return [json.loads(line) for line in (ANSWERS / name).read_text(encoding="utf-8").splitlines()]


def is_right(gold: str, text: str) -> bool:
    """As a run judges an answer to MATH."""
    right = benchmarks.judge(MATH, {"gold": gold}, text)["right"]
    assert right == scoring.is_right(gold, text)
    return right


@needs_math
@pytest.mark.parametrize("row", own("math.jsonl"), ids=lambda row: row["gold"][:24])
def test_own_answers_to_math(row):
    """Each gold with answers that mean the same and answers that do not, in the spellings of models."""
    assert [text for text in row["right"] if not is_right(row["gold"], text)] == []
    assert [text for text in row["wrong"] if is_right(row["gold"], text)] == []


@needs_math
def test_the_document_names_each_leniency():
    """Rows of docs/evaluation.md: "| what | `gold` | `answer` |", right above the heading of those that are wrong."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = text.split("## Answers to MATH")[1].split("\n## ")[0]
    passes, _, fails = section.partition("Never right")
    for part, want, least in ((passes, True, 18), (fails, False, 10)):
        found = re.findall(r"^\|[^|`]+\| `(.+?)` \| `(.+?)` \|$", part, re.MULTILINE)
        assert len(found) >= least
        assert [pair for pair in found if scoring.is_equal(*pair) is not want] == []


@needs_math
@pytest.mark.parametrize("dress", ["%s.", r"%s\,.", "%s。", "{%s}", r"\(%s\)", r"\mathbf{%s}", "= %s", r"%s\text{.}"])
def test_marks_around_any_gold(dress):
    golds = [row["gold"] for row in own("math.jsonl")]
    assert [gold for gold in golds if not is_right(gold, rf"So $\boxed{{{dress.replace('%s', gold)}}}$.")] == []


UNLIKE = r"""5; -5; 28\%; 0.7; \frac{1}{3}; \sqrt{2}; 2^{100}; \frac{1}{2004!}; 6 - 5i; 11_2; 90^\circ; 15\text{ cm}^2; (3,5); \{3,5,7\};
1,-2; [0,1); (0,9) \cup (9,36); \begin{pmatrix} 1 \\ 2 \end{pmatrix}; 3:00\text{ p.m.}; 1:2; \text{June 20}; \text{even}; \text{C,E};
\text{(C)}; x^2+1; y = 2x + 3; \pi; \emptyset; \infty"""


@needs_math
def test_other_golds_are_wrong():
    golds = [gold.strip() for gold in UNLIKE.split(";")]
    assert [one for one in golds if not scoring.is_equal(one, one)] == []
    assert [pair for pair in itertools.permutations(golds, 2) if scoring.is_equal(*pair)] == []


@needs_math
@pytest.mark.parametrize(
    "answer", ["{" * 999, "(" * 1999, "9^{9^{9^{9^9}}}", "9!!!!!", "1<x" * 500, "-" * 1999, r"\pm " * 400]
)
def test_answers_that_are_none_cost_no_time(answer):
    start = time.process_time()
    assert not any(scoring.is_equal(gold, answer) for gold in ("9", "(1,2)", r"\text{even}", "x^2"))
    assert time.process_time() - start < 20  # minutes, were they given to a parser


@pytest.mark.parametrize(
    "text, want",
    [
        (r"\boxed{1} and \boxed{2}", ["1", "2"]),
        (r"\boxed{0}, so $x=\boxed{1}$, $y = \boxed{2}$.", ["1", "2"]),
        (r"\boxed{1} and so on. \boxed{2}", ["2"]),
        (r"\boxed{1}. \boxed{2}", ["2"]),
        ("", []),
    ],
)
def test_boxes_of_one_answer(text, want):
    assert extraction.boxes(text) == want


def test_mmlu_pro_chain_on_recorded_outputs():
    samples = rows("mmlu_pro_280_replay.jsonl")
    expected = json.loads(recorded("mmlu_pro_280_expected.json").read_text())
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
        for output in row["recorded"].values():
            text = output["output"]
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
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{x = \boxed{2}} \boxed{3", r"x = \boxed{2}"),
        (r"\boxed{x = \boxed{2}", "2"),
        (r"\\boxed{5}", "5"),
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
    text = (piece * (2**18 // len(piece)))[: 2**18]
    for extract in (
        extraction.mmlu_pro_letter,
        extraction.stock_mmlu_pro_letter,
        extraction.simple_evals_letter,
        extraction.boxed,
        extraction.boxes,
        extraction.labelled_answer,
        letters.last_letter,
        letters.lenient_letter,
        lambda text: letters.marks({}, text),
        lambda text: letters.published_letter({}, text),
        lambda text: extraction.boxed("\\boxed{" + text),
        scoring.math_answer,
        extraction.after_thinking,
    ):
        start = time.process_time()
        extract(text)
        assert time.process_time() - start < 5 / 4, (piece, extract)  # quadratic time would be a minute


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
