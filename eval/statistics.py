"""Scores of a task with their intervals, and the comparison of two runs.

Questions are what was drawn, not outputs: the k outputs to a question are not independent. Scores are shares, 0 to 1. A
question's score is the mean verdict of its outputs, and a task's score the mean of its questions'.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from modeling_deepseek_moe.eval.results import Output, Question

LEVEL = 0.95
METHOD = "Wilson's for a score, Student's t for a paired difference"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is known of a task after ``n`` questions.

    Args:
        k: outputs to a question; the fewest, where questions differ.
        score, low, high: the score and its interval of `LEVEL`; None without questions, as all that follows.
        no_answer: share of outputs from which no answer was read.
        truncated: share of outputs that the token limit ended, of those where it is known; None where it never is.
        tokens: mean length of the outputs, likewise.
        stock: score by lm-eval's own task; None unless every output has that verdict.
        pass_at: k -> chance that at least one of k outputs is right.
        majority_at: k -> share of questions where the most frequent answer of the first k outputs is right.
        categories: name -> n, score, low, high; empty where questions have no category.
    """

    n: int
    k: int | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None
    no_answer: float | None = None
    truncated: float | None = None
    tokens: float | None = None
    stock: float | None = None
    pass_at: dict[int, float] = field(default_factory=dict)
    majority_at: dict[int, float] = field(default_factory=dict)
    categories: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the ``n`` questions that both have; ``difference`` is the second's score less the first's.

    Args:
        p_value: exact McNemar test, two-sided; None unless each question has one output in both runs.
        first_better, second_better: ids of the questions where that run scores higher.
        only_first, only_second: how many questions the other run lacks.
    """

    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float | None
    first_better: tuple[str, ...]
    second_better: tuple[str, ...]
    only_first: int
    only_second: int


def summarise(questions: Sequence[Question], equal: Callable[[str, str], bool] = str.__eq__) -> Scores:
    """
    Args:
        equal: whether two answers mean the same, for the majority.

    Raises:
        ValueError: two questions with one id.
    """
    _by_id(questions)
    if not questions:
        return Scores(n=0)
    outputs = [output for question in questions for output in question.outputs]
    k = min(len(question.outputs) for question in questions)
    scores = question_scores(questions)
    low, high = interval(scores)
    truncated = [output.truncated for output in outputs if output.truncated is not None]
    tokens = [output.tokens for output in outputs if output.tokens is not None]
    steps = useful_k(k)
    return Scores(
        n=len(questions),
        k=k,
        score=float(scores.mean()),
        low=low,
        high=high,
        no_answer=_mean([output.answer is None for output in outputs]),
        truncated=_mean(truncated),
        tokens=_mean(tokens),
        stock=_stock(questions),
        pass_at={step: pass_at(questions, step) for step in steps},
        majority_at={step: majority_at(questions, step, equal) for step in steps if step > 2},
        categories=_categories(questions, scores),
    )


def question_scores(questions: Sequence[Question]) -> np.ndarray:
    """``[n]`` float64, the mean verdict of each question's outputs."""
    return np.array([np.mean([output.right for output in question.outputs]) for question in questions])


def interval(scores: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of `LEVEL` of the mean of ``scores``, ``[n]``, which lie in 0 to 1.

    Right and wrong alone make it the plain one. Scores in between vary less about their mean than verdicts do, and count as
    the larger number of questions at which verdicts would vary as much; for what that variance was estimated from, Student's t
    takes the place of the normal deviate. (A percentile bootstrap of 30 questions claims 95 % and holds 91 to 95 %.)
    """
    scores = np.round(scores, 12)  # 1/3 from three outputs and 2/6 from six are one value
    n, mean = len(scores), float(np.mean(scores))
    if len(np.unique(scores)) == 1:
        return _of_one_value(mean, n, 0.0, 1.0)
    verdicts = bool(np.isin(scores, (0.0, 1.0)).all())
    variance = mean * (1 - mean)  # of a verdict
    like = n if verdicts else n * variance / float(np.var(scores, ddof=1))
    square = (_deviate() if verdicts else _deviate(n - 1)) ** 2 / like
    half = math.sqrt(square * (variance + square / 4)) / (1 + square)
    middle = (mean + square / 2) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(differences: np.ndarray) -> tuple[float, float]:
    """Student's interval of `LEVEL` of the mean of ``differences``, ``[n]``, of two scores of each question: in -1 to 1."""
    n, mean = len(differences), float(np.mean(differences))
    if len(np.unique(differences)) == 1:
        return _of_one_value(mean, n, -1.0, 1.0)
    half = _deviate(n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _of_one_value(value: float, n: int, lowest: float, highest: float) -> tuple[float, float]:
    """Where all questions are alike a variance would claim certainty: the exact binomial bound on the share of unseen, different
    questions is used, these being as far off as they can."""
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / n)
    return value - unseen * (value - lowest), value + unseen * (highest - value)


def _deviate(freedom: float = math.inf) -> float:
    from scipy.special import ndtri, stdtrit

    tail = (1 + LEVEL) / 2
    return float(ndtri(tail) if freedom == math.inf else stdtrit(freedom, tail))


def useful_k(k: int) -> list[int]:
    """Powers of two up to k, and k itself; nothing for a single output."""
    return sorted({2**power for power in range(k.bit_length())} | {k}) if k > 1 else []


def pass_at(questions: Sequence[Question], k: int) -> float:
    """Mean over questions of ``1 - C(n - c, k) / C(n, k)``, with c of n outputs right: unbiased (arXiv 2107.03374).

    Raises:
        ValueError: a question with fewer than k outputs.
    """
    return float(np.mean([_pass_at(_enough(question, k), k) for question in questions]))


def majority_at(questions: Sequence[Question], k: int, equal: Callable[[str, str], bool] = str.__eq__) -> float:
    """Share of questions where the most frequent answer of the first k outputs is right.

    Outputs without an answer have no vote, and a question without votes is wrong. Equal answers are one; the one seen first
    stands for them, and wins a tie.

    Raises:
        ValueError: a question with fewer than k outputs.
    """
    known: dict[tuple[str, str], bool] = {}

    def same(first: str, second: str) -> bool:
        if first == second:
            return True
        if (first, second) not in known:
            known[first, second] = bool(equal(first, second))
        return known[first, second]

    return _mean([_majority_is_right(_enough(question, k)[:k], same) for question in questions])


def compare(first: Sequence[Question], second: Sequence[Question]) -> Comparison:
    """
    Raises:
        ValueError: no question is in both, a question's gold differs, or an id occurs twice.
    """
    ours, theirs = _by_id(first), _by_id(second)
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise ValueError(f"found no question in both runs, of {len(ours)} and {len(theirs)}; wanted the same data")
    for name in shared:
        if ours[name].gold != theirs[name].gold:
            golds = f"{ours[name].gold!r} and {theirs[name].gold!r}"
            raise ValueError(f"question {name!r}: found the golds {golds}, wanted the same data in both runs")
    pairs = [(ours[name], theirs[name]) for name in shared]
    before, after = (question_scores(side) for side in zip(*pairs, strict=True))
    # verdicts of different k may differ by rounding alone: 1/3 from three outputs and 2/6 from six
    differences = np.round(after - before, 12)
    low, high = difference_interval(differences)
    better = tuple(name for name, value in zip(shared, differences, strict=True) if value > 0)
    worse = tuple(name for name, value in zip(shared, differences, strict=True) if value < 0)
    single = all(len(question.outputs) == 1 for pair in pairs for question in pair)
    return Comparison(
        n=len(shared),
        first=float(before.mean()),
        second=float(after.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=mcnemar(len(worse), len(better)) if single else None,
        first_better=worse,
        second_better=better,
        only_first=len(ours) - len(shared),
        only_second=len(theirs) - len(shared),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value, from how many questions only the one and only the other run got right."""
    trials = only_first + only_second
    term = total = 1  # C(trials, i), and its sum: whole numbers, so nothing is lost to rounding
    for i in range(1, min(only_first, only_second) + 1):
        term = term * (trials - i + 1) // i
        total += term
    return min(1.0, 2 * total / 2**trials)


def _pass_at(outputs: Sequence[Output], k: int) -> float:
    wrong = sum(not output.right for output in outputs)
    return 1 - math.comb(wrong, k) / math.comb(len(outputs), k)


def _majority_is_right(outputs: Sequence[Output], same: Callable[[str, str], bool]) -> bool:
    groups: list[list[Output]] = []
    for output in outputs:
        if output.answer is None:
            continue
        group = next((group for group in groups if same(group[0].answer, output.answer)), None)
        if group is None:
            groups.append([output])
        else:
            group.append(output)
    return bool(groups) and max(groups, key=len)[0].right  # max keeps the first of equals


def _enough(question: Question, k: int) -> Sequence[Output]:
    if not 1 <= k <= len(question.outputs):
        raise ValueError(f"question {question.id!r}: found k={k}, wanted 1 to its {len(question.outputs)} outputs")
    return question.outputs


def _stock(questions: Sequence[Question]) -> float | None:
    if any(output.stock_right is None for question in questions for output in question.outputs):
        return None
    return _mean([np.mean([output.stock_right for output in question.outputs]) for question in questions])


def _categories(questions: Sequence[Question], scores: np.ndarray) -> dict[str, dict]:
    members: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        members.setdefault(question.category, []).append(i)
    if set(members) == {""}:
        return {}
    found = {}
    for name in sorted(members):
        chosen = scores[members[name]]
        low, high = interval(chosen)
        found[name] = {"n": len(chosen), "score": float(chosen.mean()), "low": low, "high": high}
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _by_id(questions: Sequence[Question]) -> dict[str, Question]:
    found = {question.id: question for question in questions}
    if len(found) < len(questions):
        twice = next(name for name, times in Counter(q.id for q in questions).items() if times > 1)
        raise ValueError(f"found the question {twice!r} twice, wanted each once in a task")
    return found
