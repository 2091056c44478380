"""Each benchmark: its questions with their prompts, and how an answer is read and judged, by us and by lm-eval's own task.

A question is a dict with ``id``, ``category``, ``question`` (the problem alone), ``prompt`` (the whole user turn), ``gold``, and
``options`` where there are some.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from modeling_deepseek_moe.eval import extraction, letters, prompts, scoring_process
from modeling_deepseek_moe.eval.data import HUB, load_rows
from modeling_deepseek_moe.eval.math.scoring import MAX_ANSWER
from modeling_deepseek_moe.eval.rows import ABSENT, LETTERS


@dataclass(frozen=True)
class Scorer:
    """How a benchmark's answers are read and judged.

    Args:
        read: text to answer, or None.
        equal: gold and answer to verdict.
        stock: question and text to what lm-eval's own task reads, and its verdict; None where it cannot be run.
        others: further readings, keys of `letters.READINGS`: question and text to answer.
        marks: question and text to keys of `letters.MARKS`.
    """

    read: Callable[[str], str | None]
    equal: Callable[[str, str], bool]
    stock: Callable[[dict, str], tuple[str | None, bool]] | None = None
    others: dict[str, Callable[[dict, str], str | None]] = field(default_factory=dict)
    marks: Callable[[dict, str], tuple[str, ...]] | None = None


def judge(scorer: Scorer, question: dict, text: str, thinking: bool = False) -> dict:
    """The fields ``answer``, ``right``, ``stock_answer``, ``stock_right``, ``readings`` and ``marks`` of an `Output`.

    Args:
        thinking: what comes before ``</think>`` is no answer, and without it there is none.
    """
    said = extraction.after_thinking(text) if thinking else text
    answer = scorer.read(said)
    judged: dict = {"answer": answer, "right": answer is not None and scorer.equal(question["gold"], answer)}
    judged |= {"stock_answer": None, "stock_right": None, "readings": {}}
    judged["marks"] = scorer.marks(question, said) if scorer.marks else ()
    for name, read in scorer.others.items():
        other = read(question, said)
        judged["readings"][name] = {"answer": other, "right": other == question["gold"]}
    if scorer.stock is not None:
        # lm-eval's think_end_token does this: where thinking never ended, the thoughts are the answer
        rest = text.rpartition(extraction.THINK_END)[2].lstrip() if thinking else text
        stock_answer, stock_right = scorer.stock(question, rest)
        judged |= {"stock_answer": stock_answer, "stock_right": bool(stock_right)}
    return judged


def judge_repeat(scorer: Scorer, question: dict, text: str, repeat: int, thinking: bool = False) -> dict:
    """As `judge`, of the output of a repeat that may have had its options in another order.

    The letters of the verdict are those of the first repeat, so that a vote counts options and not places; ``order`` and
    ``prompt`` are of this one, where they differ.
    """
    order = question["orders"][repeat] if "orders" in question else ""
    if not repeat or not order:
        return judge(scorer, question, text, thinking)
    places = dict(zip("ABCD", question["options"], strict=True))
    asked = question | {"options": [places[letter] for letter in order], "gold": "ABCD"[order.index(question["gold"])]}
    judged = judge(scorer, asked, text, thinking)
    first = dict(zip("ABCD", order, strict=True))
    for found in (judged, *judged["readings"].values()):
        for name in ("answer", "stock_answer"):
            if found.get(name):
                found[name] = first.get(found[name].upper(), found[name])
    return judged | {"order": order, "prompt": question["prompts"][repeat]}


def _stock_mmlu_pro(question: dict, text: str) -> tuple[str | None, bool]:
    letter = extraction.stock_mmlu_pro_letter(text)
    return letter, letter == question["gold"]


def _stock_math(question: dict, text: str) -> tuple[str | None, bool]:
    from lm_eval.tasks.hendrycks_math.utils import process_results

    verdict = process_results({"solution": f"\\boxed{{{question['gold']}}}"}, [text])
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if last > first else text[:MAX_ANSWER], bool(verdict["exact_match"])


def _stock_aime(question: dict, text: str) -> tuple[str | None, bool]:
    from lm_eval.tasks.aime.utils import process_results

    return extraction.boxed(text), bool(process_results({"answer": question["gold"]}, [text])["exact_match"])


def _stock_gpqa(question: dict, text: str) -> tuple[str | None, bool]:
    """lm-eval's ``gpqa_diamond_cot_zeroshot``, the more lenient of its two filters."""
    from lm_eval.filters.extraction import MultiChoiceRegexFilter

    reader = MultiChoiceRegexFilter(
        regex_pattern=r"(\([A-Z]\))", group_select=-1, ignore_case=True, ignore_punctuation=True
    )
    found = reader.apply([[text]], [{"choices": list(question["options"])}])[0][0].strip("()")
    return (None if found == "[invalid]" else found), found.upper() == question["gold"]


def _same(gold: str, answer: str) -> bool:
    return gold == answer


def _lenient(question: dict, text: str) -> str | None:
    return letters.lenient_letter(text, LETTERS[: len(question.get("options", LETTERS))])


SCORERS = {
    "mmlu_pro": Scorer(
        extraction.mmlu_pro_letter,
        _same,
        _stock_mmlu_pro,
        others={
            "published": letters.published_letter,
            "last": lambda _, text: letters.last_letter(text),
            "lenient": _lenient,
        },
        marks=letters.marks,
    ),
    "math500": Scorer(scoring_process.math_answer, scoring_process.is_equal, _stock_math),
    "math": Scorer(extraction.minerva_answer, scoring_process.is_equal),
    "aime24": Scorer(scoring_process.math_answer, scoring_process.is_equal, _stock_aime),
    "aime25": Scorer(scoring_process.math_answer, scoring_process.is_equal, _stock_aime),
    "aime26": Scorer(scoring_process.math_answer, scoring_process.is_equal),
    "hmmt_feb25": Scorer(scoring_process.math_answer, scoring_process.is_equal),
    "gpqa_diamond": Scorer(extraction.simple_evals_letter, _same, _stock_gpqa, others={"lenient": _lenient}),
}


def mmlu_pro(
    data: str = HUB, shots: int = 5, prompt: Callable[..., str] = prompts.mmlu_pro
) -> tuple[list[dict], dict]:
    """Questions, and the facts of their data. The examples are the first ``shots`` validation rows of the category.

    Raises:
        ValueError: a category with too few examples, or one without its worked answer.
    """
    rows, facts = load_rows("mmlu_pro", "test", data)
    examples = load_rows("mmlu_pro", "validation", data)[0] if shots else []
    by_category: dict[str, list[dict]] = {}
    for number, row in enumerate(examples, 1):
        if prompt is prompts.mmlu_pro and not row["cot_content"]:
            raise ValueError(f"mmlu_pro: example {number}: cot_content: found none, wanted the worked answer")
        by_category.setdefault(row["category"], []).append(_options(row))
    questions = []
    for row in map(_options, rows):
        shown = by_category.get(row["category"], [])[:shots]
        if len(shown) < shots:
            raise ValueError(f"mmlu_pro: found {len(shown)} examples of {row['category']!r}, wanted {shots}")
        question = {"id": str(row["question_id"]), "category": row["category"], "question": row["question"]}
        question |= {"options": row["options"], "gold": row["answer"], "prompt": prompt(row, shown)}
        questions.append(question)
    return questions, facts


def _options(row: dict) -> dict:
    return row | {"options": [str(option) for option in row["options"] if option != ABSENT]}


def math500(data: str = HUB) -> tuple[list[dict], dict]:
    rows, facts = load_rows("math500", "test", data)
    return [_boxed(row["unique_id"], row["subject"] or "", row) for row in rows], facts


def contest(benchmark: str, data: str = HUB) -> tuple[list[dict], dict]:
    """AIME's or HMMT's problems."""
    rows, facts = load_rows(benchmark, "test", data)
    return [_boxed(row["id"], "", row) for row in rows], facts


aime24, aime25, aime26, hmmt_feb25 = (partial(contest, name) for name in ("aime24", "aime25", "aime26", "hmmt_feb25"))


def _boxed(name: object, category: str, row: dict) -> dict:
    question = {"id": str(name), "category": category, "question": row["problem"]}
    return question | {"gold": str(row["answer"]), "prompt": prompts.boxed(row)}


def math(data: str = HUB) -> tuple[list[dict], dict]:
    """The whole MATH test set, for base models; the gold is the box of the solution."""
    rows, facts = load_rows("math", "test", data)
    questions = []
    for number, row in enumerate(rows):
        question = {"id": str(number), "category": row["subject"] or "", "question": row["problem"]}
        questions.append(question | {"gold": extraction.boxed(row["solution"]), "prompt": prompts.minerva(row)})
    return questions, facts


def gpqa_diamond(data: str = HUB, k: int = 1) -> tuple[list[dict], dict]:
    """Options in the order that simple-evals draws from ``Random(0)``: question after question, and again for each repeat.

    A question has ``prompts`` and ``orders``, one of each of the k repeats; its ``prompt``, ``options`` and ``gold`` are those
    of the first. An order says of A, B, C and D which letter that option has in the first repeat.
    """
    rows, facts = load_rows("gpqa_diamond", "test", data)
    draw, questions = random.Random(0), []
    drawn = [[draw.sample(range(4), 4) for _ in rows] for _ in range(k)]
    for number, row in enumerate(rows):
        given = [row["correct"], *(row[f"incorrect_{i}"] for i in (1, 2, 3))]
        orders = [repeat[number] for repeat in drawn]
        shown = [row | {"options": [str(given[i]).strip() for i in order]} for order in orders]
        question = {"id": str(row["id"]), "category": row["category"] or "", "question": row["question"]}
        question |= {"options": shown[0]["options"], "gold": "ABCD"[orders[0].index(0)]}
        question |= {"prompts": [prompts.gpqa(one) for one in shown]}
        question |= {"orders": ["".join("ABCD"[orders[0].index(i)] for i in order) for order in orders]}
        questions.append(question | {"prompt": question["prompts"][0]})
    return questions, facts


QUESTIONS: dict[str, Callable[..., tuple[list[dict], dict]]] = {
    "mmlu_pro": mmlu_pro,
    "math500": math500,
    "math": math,
    "gpqa_diamond": gpqa_diamond,
    "aime24": aime24,
    "aime25": aime25,
    "aime26": aime26,
    "hmmt_feb25": hmmt_feb25,
}
