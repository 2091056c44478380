"""MMLU-Pro for lm-eval: see README.md next to this file."""

from modeling_deepseek_moe.eval import benchmarks, prompts
from modeling_deepseek_moe.eval.harness import dataset, keep_all, verdicts
from modeling_deepseek_moe.eval.rows import LETTERS

__all__ = ["base_questions", "keep_all", "letters", "r1_questions", "r1_verdicts", "v3_questions", "v3_verdicts"]

v3_questions = dataset(benchmarks.mmlu_pro, shots=5)
r1_questions = dataset(benchmarks.mmlu_pro, shots=0)
base_questions = dataset(benchmarks.mmlu_pro, shots=5, prompt=prompts.mmlu_pro_letters)
v3_verdicts = verdicts("mmlu_pro")
r1_verdicts = verdicts("mmlu_pro", thinking=True)


def letters(doc: dict) -> list[str]:
    return list(LETTERS[: len(doc["options"])])
