"""Evaluation under DeepSeek's protocols: questions, a model class for lm-eval, verdicts, statistics, reports."""
