"""aime24 for lm-eval: see README.md next to this file."""

from modeling_deepseek_moe.eval import benchmarks
from modeling_deepseek_moe.eval.harness import dataset, keep_all, verdicts

__all__ = ["keep_all", "r1_questions", "r1_verdicts", "v3_questions", "v3_verdicts"]

v3_questions = r1_questions = dataset(benchmarks.aime24)
v3_verdicts = verdicts("aime24")
r1_verdicts = verdicts("aime24", thinking=True)
