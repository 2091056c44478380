"""Each benchmark: its questions with their prompts, and how an answer is read and judged, by us and by lm-eval's own task.

A question is a dict with ``id``, ``category``, ``question`` (the problem alone), ``prompt`` (the whole user turn), ``gold``, and
``options`` where there are some.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from modeling_deepseek_moe.eval import extraction, math_scoring, prompts, scoring_process
from modeling_deepseek_moe.eval.data import HUB, load_rows
from modeling_deepseek_moe.eval.rows import ABSENT


@dataclass(frozen=True)
class Scorer:
    """How a benchmark's answers are read and judged.

    Args:
        read: text to answer, or None.
        equal: gold and answer to verdict.
        stock: question and text to what lm-eval's own task reads, and its verdict; None where it cannot be run.
    """

    read: Callable[[str], str | None]
    equal: Callable[[str, str], bool]
    stock: Callable[[dict, str], tuple[str | None, bool]] | None = None


def judge(scorer: Scorer, question: dict, text: str, thinking: bool = False) -> dict:
    """The fields ``answer``, ``right``, ``stock_answer`` and ``stock_right`` of an `Output`.

    Args:
        thinking: what comes before ``</think>`` is no answer, and without it there is none.
    """
    answer = scorer.read(extraction.after_thinking(text) if thinking else text)
    right = answer is not None and scorer.equal(question["gold"], answer)
    if scorer.stock is None:
        return {"answer": answer, "right": right, "stock_answer": None, "stock_right": None}
    # lm-eval's think_end_token does this: where thinking never ended, the thoughts are the answer
    rest = text.rpartition(extraction.THINK_END)[2].lstrip() if thinking else text
    stock_answer, stock_right = scorer.stock(question, rest)
    return {"answer": answer, "right": right, "stock_answer": stock_answer, "stock_right": bool(stock_right)}


def _stock_mmlu_pro(question: dict, text: str) -> tuple[str | None, bool]:
    letter = extraction.stock_mmlu_pro_letter(text)
    return letter, letter == question["gold"]


def _stock_math(question: dict, text: str) -> tuple[str | None, bool]:
    from lm_eval.tasks.hendrycks_math.utils import process_results

    verdict = process_results({"solution": f"\\boxed{{{question['gold']}}}"}, [text])
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if last > first else text[: math_scoring.MAX_ANSWER], bool(verdict["exact_match"])


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


SCORERS = {
    "mmlu_pro": Scorer(extraction.mmlu_pro_letter, _same, _stock_mmlu_pro),
    "math500": Scorer(scoring_process.math_answer, scoring_process.is_equal, _stock_math),
    "math": Scorer(extraction.minerva_answer, scoring_process.is_equal),
    "aime24": Scorer(scoring_process.math_answer, scoring_process.is_equal, _stock_aime),
    "aime25": Scorer(scoring_process.math_answer, scoring_process.is_equal, _stock_aime),
    "aime26": Scorer(scoring_process.math_answer, scoring_process.is_equal),
    "hmmt_feb25": Scorer(scoring_process.math_answer, scoring_process.is_equal),
    "gpqa_diamond": Scorer(extraction.simple_evals_letter, _same, _stock_gpqa),
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


def gpqa_diamond(data: str = HUB) -> tuple[list[dict], dict]:
    """Options in the order that simple-evals draws from ``Random(0)``, question after question."""
    rows, facts = load_rows("gpqa_diamond", "test", data)
    draw, questions = random.Random(0), []
    for row in rows:
        given = [row["correct"], *(row[f"incorrect_{i}"] for i in (1, 2, 3))]
        order = draw.sample(range(4), 4)
        shown = row | {"options": [str(given[i]).strip() for i in order]}
        question = {"id": str(row["id"]), "category": row["category"] or "", "question": row["question"]}
        question |= {"options": shown["options"], "gold": "ABCD"[order.index(0)], "prompt": prompts.gpqa(shown)}
        questions.append(question)
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
