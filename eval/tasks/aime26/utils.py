"""aime26 for lm-eval: see README.md next to this file."""

from modeling_deepseek_moe.eval import benchmarks
from modeling_deepseek_moe.eval.harness import dataset, keep_all, verdicts

__all__ = ["all_questions", "keep_all", "thinking_verdicts"]

all_questions = dataset(benchmarks.aime26)
thinking_verdicts = verdicts("aime26", thinking=True)
