"""Held-out problems as rows of MMLU-Pro and MATH-500: ``python -m modeling_deepseek_moe.tiny.rows FOLDER``.

`deepseek-moe eval --data sample` asks them, so that an evaluation runs without a network. They are this project's own
questions, in the columns of those data sets; a score on them says nothing about a score on the data sets themselves.
"""

import argparse
import json
from pathlib import Path

from modeling_deepseek_moe.tiny.corpus import CATEGORIES, LETTERS, WORD_PROBLEMS, Problem, problems

SHOTS, QUESTIONS, PROBLEMS = 5, 20, 12  # rows a category for examples and for the test, word problems a family
SOURCE = "modeling_deepseek_moe.tiny.corpus"
SEED = 500


def mmlu_pro_rows(per_category: int, *, seed: int, first_id: int, solved: bool) -> list[dict]:
    """Different held-out questions in MMLU-Pro's columns; ``solved`` gives them their chain of thought."""
    wanted: dict[str, list[Problem]] = {category: [] for category in CATEGORIES}
    for problem in problems(seed, held_out=True, family="choice"):
        kept = wanted[problem.category]
        if len(kept) < per_category and problem.question not in {other.question for other in kept}:
            kept.append(problem)
        if all(len(kept) == per_category for kept in wanted.values()):
            break
    return [
        {
            "question_id": first_id + number,
            "question": problem.question,
            "options": list(problem.options),
            "answer": problem.answer,
            "answer_index": LETTERS.index(problem.answer),
            "cot_content": f"A: Let's think step by step. {problem.solution}" if solved else "",
            "category": problem.category,
            "src": SOURCE,
        }
        for number, problem in enumerate(problem for kept in wanted.values() for problem in kept)
    ]


def math500_rows(per_family: int, *, seed: int) -> list[dict]:
    """Different held-out word problems in MATH-500's columns; the level is the family's place, from 1."""
    rows = []
    for level, family in enumerate(WORD_PROBLEMS, 1):
        subject = "Algebra" if family == "equation" else "Prealgebra"
        seen: dict[str, Problem] = {}
        for problem in problems(seed, held_out=True, family=family):
            seen[problem.question] = problem
            if len(seen) == per_family:
                break
        rows += [
            {
                "problem": problem.question,
                "solution": problem.solution,
                "answer": problem.answer,
                "subject": subject,
                "level": level,
                "unique_id": f"test/{subject.lower()}/{family.replace(' ', '-')}-{number}.json",
            }
            for number, problem in enumerate(seen.values())
        ]
    return rows


def write(folder: Path) -> list[Path]:
    """The three files, the same bytes each time; an existing one is replaced."""
    parts = {
        "mmlu_pro_test": mmlu_pro_rows(seed=SEED, per_category=QUESTIONS, first_id=0, solved=False),
        "mmlu_pro_validation": mmlu_pro_rows(seed=SEED + 1, per_category=SHOTS, first_id=1000, solved=True),
        "math500": math500_rows(PROBLEMS, seed=SEED),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, rows in parts.items():
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for file in write(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
