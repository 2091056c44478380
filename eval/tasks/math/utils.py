"""MATH, four worked examples, for base models and lm-eval: see README.md next to this file."""

from modeling_deepseek_moe.eval import benchmarks
from modeling_deepseek_moe.eval.harness import dataset, keep_all, verdicts

__all__ = ["base_questions", "base_verdicts", "keep_all"]

base_questions = dataset(benchmarks.math)
base_verdicts = verdicts("math")
