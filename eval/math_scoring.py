"""Is an answer to a MATH problem right: math-verify, with the gold from the ``answer`` column.

The gold is never parsed from the solution: there ``\\boxed{25\\%}`` misparses and marks right answers wrong.
"""

import logging
import threading

from modeling_deepseek_moe.eval.extraction import boxed

TIME_LIMIT = 5  # seconds for 9^{9^{9^9}} and its like
MAX_ANSWER = 2000  # characters: an answer longer than any in the benchmark is no answer, and costs parsing time


def math_answer(text: str) -> str | None:
    """What the text gives as its answer: the last box, or None."""
    answer = boxed(text)
    return answer if answer and len(answer) <= MAX_ANSWER else None


def is_equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers, without box or dollar signs, mean the same.

    Raises:
        ImportError: math-verify is missing.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError('found no math-verify, wanted it to score MATH: pip install "math-verify"') from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # its timeouts are alarm signals, which work in a main thread only
    limit = TIME_LIMIT if threading.current_thread() is threading.main_thread() else None
    golds, answers = (parse(f"\\boxed{{{latex}}}", parsing_timeout=limit) for latex in (gold, answer))
    return bool(verify(golds, answers, timeout_seconds=limit))
