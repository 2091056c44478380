"""gpqa_diamond for lm-eval: see README.md next to this file."""

from modeling_deepseek_moe.eval import benchmarks
from modeling_deepseek_moe.eval.harness import ReorderedTask, dataset, keep_all, verdicts

__all__ = ["ReorderedTask", "keep_all", "r1_questions", "r1_verdicts", "v3_questions", "v3_verdicts"]

v3_questions = r1_questions = dataset(benchmarks.gpqa_diamond, k=1)
v3_verdicts = verdicts("gpqa_diamond")
r1_verdicts = verdicts("gpqa_diamond", thinking=True)
