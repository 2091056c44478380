"""The words put to the model, one function a prompt, each as its source has it.

Sources: MMLU-Pro's ``evaluate_from_api.py``; simple-evals' ``QUERY_TEMPLATE_MULTICHOICE``; the README files of DeepSeek-Math and
DeepSeek-R1 for the boxed answer; Minerva's four examples through lm-eval.
"""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from modeling_deepseek_moe.eval.rows import LETTERS

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
GPQA = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
)


def mmlu_pro(row: dict, shots: Sequence[dict] = ()) -> str:
    """Chain of thought, everything in one user turn; ``shots`` are rows of the same category."""
    head = (
        f"The following are multiple choice questions (with answers) about {row['category']}. Think step by step and then "
        'output the answer in the format of "The answer is (X)" at the end.\n\n'
    )
    examples = (_mmlu_pro_example(shot, shot["cot_content"].removeprefix("A: ") + "\n\n") for shot in shots)
    return head + "".join(examples) + _mmlu_pro_example(row, "Let's think step by step.")


def mmlu_pro_letters(row: dict, shots: Sequence[dict] = ()) -> str:
    """For base models, by likelihood: the examples end in their letter alone, and the letter is what is asked for."""
    head = f"The following are multiple choice questions (with answers) about {row['category']}.\n\n"
    examples = (_mmlu_pro_example(shot, f"{shot['answer']}\n\n") for shot in shots)
    return head + "".join(examples) + _mmlu_pro_example(row, "").removesuffix(" ")


def _mmlu_pro_example(row: dict, answer: str) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, row["options"], strict=False))
    return f"Question: {row['question']}\nOptions: {options}Answer: {answer}"


def boxed(row: dict) -> str:
    return row["problem"] + BOXED


def gpqa(row: dict) -> str:
    options = "\n".join(f"{letter}) {option}" for letter, option in zip("ABCD", row["options"], strict=True))
    return f"{GPQA}\n\n{row['question']}\n\n{options}"


def minerva(row: dict) -> str:
    """Four worked problems, then this one, for base models."""
    shots = "".join(f"{_minerva(shot)} {shot['solution']}\n\n" for shot in minerva_examples())
    return shots + _minerva(row)


def _minerva(row: dict) -> str:
    return f"Problem:\n{row['problem']}\n\nSolution:"


def minerva_examples() -> list[dict]:
    """The four examples of lm-eval's ``minerva_math``, read from its source: to import it takes an outdated antlr4.

    Raises:
        ValueError: this version of lm-eval has them elsewhere.
    """
    spec = importlib.util.find_spec("lm_eval")
    file = Path(spec.origin).parent / "tasks" / "minerva_math" / "utils.py"
    if file.is_file():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
                last = node.body[-1]
                if isinstance(last, ast.Return):
                    return ast.literal_eval(last.value)
    raise ValueError(f"{file}: found no list_fewshot_samples, wanted the four examples of lm-eval 0.4.13")
