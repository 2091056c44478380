"""Scores and intervals, held against scipy, closed forms and enumerations."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from modeling_deepseek_moe.eval import statistics
from modeling_deepseek_moe.eval.results import Output, Question


def question(name, rights, answers=None, gold="A", category="", **fields):
    answers = answers or ["A" if right else "B" for right in rights]
    outputs = tuple(Output(text="", answer=a, right=r, **fields) for r, a in zip(rights, answers, strict=True))
    return Question(id=str(name), question="", prompt="", gold=gold, outputs=outputs, category=category)


def singles(rights, **fields):
    return [question(i, [bool(right)], **fields) for i, right in enumerate(rights)]


def test_score_is_the_mean_over_questions_of_the_mean_over_outputs():
    scores = statistics.summarise([question(0, [True, False]), question(1, [True, True, True, True])])
    assert (scores.n, scores.k, scores.score) == (2, 2, 0.75)  # not 5 of 6 outputs


@pytest.mark.parametrize("right", [1, 7, 15, 29])
def test_interval_of_verdicts_is_wilsons(right):
    scores = np.array([1.0] * right + [0.0] * (30 - right))
    exact = stats.binomtest(right, 30).proportion_ci(method="wilson")
    assert statistics.interval(scores) == pytest.approx((exact.low, exact.high))


def test_interval_of_parts_is_wilsons_at_as_many_verdicts_as_vary_alike():
    """Halves vary half as much as verdicts: 40 of them are 80 verdicts, less the one that the mean took."""
    scores = np.array([0.0] * 10 + [0.5] * 20 + [1.0] * 10)
    like = 80 * 39 / 40
    q = stats.t.ppf(0.975, 39)
    exact = np.sqrt(q**2 / like * (0.25 + q**2 / like / 4)) / (1 + q**2 / like)
    low, high = statistics.interval(scores)
    assert (low, high) == pytest.approx((0.5 - exact, 0.5 + exact))


@pytest.mark.parametrize("k", [1, 4])
def test_interval_of_many_questions_is_the_bootstraps(k):
    scores = np.random.default_rng(1).binomial(k, 0.7, size=300) / k
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert statistics.interval(scores) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_difference_interval_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    first, second = rng.binomial(4, 0.5, 30) / 4, rng.binomial(4, 0.7, 30) / 4
    exact = stats.ttest_rel(second, first).confidence_interval()
    assert statistics.difference_interval(second - first) == pytest.approx((exact.low, exact.high))
    assert statistics.difference_interval(np.array([-1.0, 1.0])) == (-1, 1)


# What makes questions easy or hard: Beta laws of their chances, from all alike to solved-or-not, for weak and strong models.
DIFFICULTIES = [(30, 30), (2, 2), (1, 1), (0.5, 0.5), (0.3, 1), (1, 0.3), (4, 1), (2, 8), (0.5, 0.12), (0.25, 1.5)]
QUESTIONS = 30  # of an AIME


def covered(k, law, times, rng):
    """Share of simulated sets of 30 questions, k outputs each, whose interval holds the mean over all questions."""
    chances = rng.beta(*law, size=(times, QUESTIONS))
    sets = rng.binomial(k, chances) / k
    mean = law[0] / sum(law)
    return np.mean([low <= mean <= high for low, high in map(statistics.interval, sets)])


def covered_pairs(k, law, alike, times, rng):
    """The same for the difference of two models: the second has the first's chance moved by 0.05 to 1, or one of its own."""
    first = rng.beta(*law, size=(times, QUESTIONS))
    own = rng.beta(*law, size=(times, QUESTIONS))
    second = first + 0.3 * (1 - first) * own if alike else own
    mean = law[0] / sum(law)
    wanted = 0.3 * (1 - mean) * mean if alike else 0.0
    differences = (rng.binomial(k, second) - rng.binomial(k, first)) / k
    return np.mean([low <= wanted <= high for low, high in map(statistics.difference_interval, differences)])


@pytest.mark.parametrize("k", [1, 16, 64])
def test_intervals_of_an_aime_cover_as_often_as_they_say(k):
    rng = np.random.default_rng(k)
    shares = [covered(k, law, 600, rng) for law in DIFFICULTIES]
    pairs = [covered_pairs(k, law, alike, 300, rng) for law in DIFFICULTIES for alike in (False, True)]
    # 6,000 sets each: a standard error of 0.3 %
    assert np.mean(shares) == pytest.approx(0.95, abs=0.015)
    assert np.mean(pairs) == pytest.approx(0.95, abs=0.015)
    assert min(shares) > 0.89 and min(pairs) > 0.89


@pytest.mark.long
@pytest.mark.parametrize("k", [1, 16, 64])
def test_coverage_by_simulation(k, capsys):
    """95 ± 1 % over the laws; of a single law, 92 to 98: with one output a score has 31 values, and no rule holds at each mean."""
    rng = np.random.default_rng(k)
    shares = {law: covered(k, law, 10_000, rng) for law in DIFFICULTIES}
    pairs = {
        (law, alike): covered_pairs(k, law, alike, 10_000, rng) for law in DIFFICULTIES for alike in (False, True)
    }
    with capsys.disabled():
        for name, found in (("score", shares), ("difference", pairs)):
            values = [100 * value for value in found.values()]
            print(f"k = {k}, {name}: {np.mean(values):.1f} %, {min(values):.1f} to {max(values):.1f}")
    for found in (shares, pairs):
        assert np.mean([*found.values()]) == pytest.approx(0.95, abs=0.01)
        assert all(0.915 < value < 0.985 for value in found.values()), found


def test_interval_of_a_benchmark_is_the_normal_approximation_of_it():
    scores = np.random.default_rng(0).binomial(1, 0.759, size=12_032).astype(float)
    low, high = statistics.interval(scores)
    half = 1.96 * np.sqrt(0.759 * 0.241 / 12_032)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize("n", [1, 10, 500])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike_is_not_certainty(n, value):
    """The exact (Clopper-Pearson) interval at 0 of n and at n of n."""
    low, high = statistics.interval(np.full(n, value))
    bound = 1 - 0.025 ** (1 / n)
    assert (low, high) == pytest.approx((0, bound) if value == 0 else (1 - bound, 1))
    exact = stats.binomtest(int(value * n), n).proportion_ci(method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_equals_every_choice_of_k_outputs(right, k):
    verdicts = [True] * right + [False] * (5 - right)
    chosen = list(itertools.combinations(verdicts, k))
    want = Fraction(sum(map(any, chosen)), len(chosen))
    assert statistics.pass_at([question(0, verdicts)], k) == pytest.approx(float(want))


def test_pass_at_1_is_the_score():
    questions = [question(i, verdicts) for i, verdicts in enumerate(itertools.product([True, False], repeat=4))]
    scores = statistics.summarise(questions)
    assert scores.pass_at[1] == pytest.approx(scores.score)
    assert list(scores.pass_at) == [1, 2, 4]


def test_useful_k():
    assert statistics.useful_k(1) == []
    assert statistics.useful_k(5) == [1, 2, 4, 5]
    assert statistics.useful_k(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    "answers, right",
    [
        (["A", "B", "A"], True),
        (["B", "A", "B"], False),
        (["A", "B"], True),  # a tie: the one seen first
        (["B", "A"], False),
        ([None, None, "A"], True),  # no answer has no vote
        ([None, None], False),
        (["B", "0.5", "1/2"], True),
        (["B", "B", "0.5", "1/2", "1/2"], True),
    ],
)
def test_majority(answers, right):
    def equal(first, second):
        return {first, second} == {"0.5", "1/2"}

    verdicts = [answer in ("A", "0.5", "1/2") for answer in answers]
    assert statistics.majority_at([question(0, verdicts, answers)], len(answers), equal) == right


def test_majority_takes_the_first_k_and_strings_as_they_are():
    one = question(0, [True, False, False], ["A", "B", "B "])
    assert statistics.majority_at([one], 1) == 1
    assert statistics.majority_at([one], 3) == 1  # "B" and "B " are two answers
    with pytest.raises(ValueError, match="question '0': found k=4, wanted 1 to its 3 outputs"):
        statistics.majority_at([one], 4)


def test_rates_and_stock():
    questions = [
        question(0, [True, False], ["A", None], truncated=False, tokens=10, stock_right=True),
        question(1, [True, False], ["A", None], truncated=True, tokens=30, stock_right=False),
    ]
    scores = statistics.summarise(questions)
    assert (scores.no_answer, scores.truncated, scores.tokens, scores.stock) == (0.5, 0.5, 20, 0.5)
    unknown = statistics.summarise(singles([1, 0]))
    assert (unknown.truncated, unknown.tokens, unknown.stock) == (None, None, None)
    assert statistics.summarise([*questions, question(2, [True])]).stock is None


def test_categories():
    questions = [question(i, [i < 3], category="law" if i % 2 else "art") for i in range(6)]
    scores = statistics.summarise(questions)
    assert {name: (c["n"], c["score"]) for name, c in scores.categories.items()} == {
        "art": (3, pytest.approx(2 / 3)),
        "law": (3, pytest.approx(1 / 3)),
    }
    assert all(0 <= c["low"] <= c["score"] <= c["high"] <= 1 for c in scores.categories.values())
    assert statistics.summarise(singles([1])).categories == {}


def test_no_questions():
    assert statistics.summarise([]) == statistics.Scores(n=0)


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (3, 12), (12, 3), (7, 7), (400, 452), (3000, 3200)])
def test_mcnemar_agrees_with_scipy(pair):
    want = stats.binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0
    assert statistics.mcnemar(*pair) == pytest.approx(want, rel=1e-9)


def test_mcnemar_by_enumeration():
    """Of the 2^8 ways that 8 coins fall, those at least as uneven as 1 to 7."""
    uneven = sum(min(sum(coins), 8 - sum(coins)) <= 1 for coins in itertools.product([0, 1], repeat=8))
    assert statistics.mcnemar(1, 7) == uneven / 2**8


def test_compare_uses_the_questions_of_both():
    first = singles([1, 1, 0, 0, 1, 1])
    second = list(reversed(singles([1, 0, 1, 1, 1])))
    found = statistics.compare(first, second)
    assert (found.n, found.only_first, found.only_second) == (5, 1, 0)
    assert (found.first, found.second, found.difference) == (0.6, 0.8, pytest.approx(0.2))
    assert (found.first_better, found.second_better) == (("1",), ("2", "3"))
    assert found.p_value == statistics.mcnemar(1, 2)
    assert found.low < found.difference < found.high


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    rights = rng.random(1000) < 0.6
    found = statistics.compare(singles(rights), singles(rights | (rng.random(1000) < 0.05)))
    assert 0 < found.low < found.high < 0.05
    assert found.p_value < 1e-4


def test_compare_several_outputs_has_no_p_value():
    first = [question(i, [True, False, False]) for i in range(4)]
    second = [question(i, [True, False] * 3) for i in range(4)]
    found = statistics.compare(first, second)
    assert found.p_value is None
    assert found.difference == pytest.approx(1 / 6)
    assert len(found.second_better) == 4
    same = statistics.compare(first, [question(i, [True, True, *[False] * 4]) for i in range(4)])
    assert same.first_better == same.second_better == ()
    assert same.low == -same.high < 0


def test_compare_refuses():
    with pytest.raises(ValueError, match="found no question in both runs, of 2 and 1"):
        statistics.compare(singles([1, 0]), [question("other", [True])])
    with pytest.raises(ValueError, match="question '0': found the golds 'A' and 'C', wanted the same data"):
        statistics.compare([question(0, [True])], [question(0, [True], gold="C")])
    with pytest.raises(ValueError, match="found the question '0' twice"):
        statistics.compare([question(0, [True])] * 2, [question(0, [True])])
    with pytest.raises(ValueError, match="found the question '0' twice"):
        statistics.summarise([question(0, [True])] * 2)
