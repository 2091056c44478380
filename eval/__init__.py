"""Evaluation with lm-eval under the protocol of DeepSeek; no task is here yet."""
