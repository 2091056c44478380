"""The report of one or more evaluations: a page, a chart and their numbers."""

from modeling_deepseek_moe.eval.report.page import write_report

__all__ = ["write_report"]
