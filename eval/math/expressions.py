"""Whether two LaTeX expressions are equal: numbers exactly, all else by math-verify, which parses both.

math-verify rounds to six digits, so that ``1/2004!`` and ``1/2006!`` are one to it, and leaves out words. Here two constants are
equal where they are in whole numbers, or to fifty digits and more where roots and logarithms are in them.
"""

import logging
import math
import re
import threading
from collections.abc import Callable

TIME_LIMIT = 5  # seconds for 9^{9^{9^9}} and its like
MAX_LENGTH, MAX_DEPTH, MAX_RELATIONS = 500, 20, 6  # of what math-verify is asked to parse
MAX_BITS = 2**18  # a constant of more is compared by its form
_ALONE = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
# words, digits in a base and endless decimals: math-verify drops what it does not know of them
_UNREAD = re.compile(r"\\text|\d\s*_|\\[lcd]?dots|…|\.\.\.|[^\x00-\x7f]")


def load_math_verify() -> tuple[Callable, Callable]:
    """Its ``parse`` and ``verify``.

    Raises:
        ImportError: math-verify is missing.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError('found no math-verify, wanted it to score MATH: pip install "math-verify"') from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return parse, verify


def expressions_are_equal(gold: str, given: str) -> bool:
    """Whether two expressions, in the spelling of `plain`, mean the same."""
    if "".join(gold.split()) == "".join(given.split()):
        return True
    if any(_UNREAD.search(latex) or _is_tangled(latex) for latex in (gold, given)):
        return False
    parse, verify = load_math_verify()
    # its timeouts are alarm signals, which work in a main thread only
    limit = TIME_LIMIT if threading.current_thread() is threading.main_thread() else None
    golds, answers = (
        parse(f"\\boxed{{{_ALONE.sub(' i ', latex)}}}", parsing_timeout=limit) for latex in (gold, given)
    )
    if golds and answers:
        golds[0], answers[0] = _imaginary(golds[0]), _imaginary(answers[0])
        if any(hasattr(one, "args") and _bits(one) > MAX_BITS for one in (golds[0], answers[0])):
            return bool(golds[0] == answers[0])
        exact = _constants_are_equal(golds[0], answers[0])
        if exact is not None:
            return exact
    return bool(verify(golds, answers, timeout_seconds=limit))


def _imaginary(expression):
    """With i the imaginary unit: math-verify takes it for a variable where a letter or a bracket is next to it."""
    import sympy

    symbols = [one for one in getattr(expression, "free_symbols", ()) if one.name == "i"]
    return expression.xreplace(dict.fromkeys(symbols, sympy.I)) if symbols else expression


def _is_tangled(latex: str) -> bool:
    """Longer or deeper than any answer to a problem is: a parser would spend minutes on it."""
    depth = deepest = 0
    for char in latex:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH or len(latex) > MAX_LENGTH or len(re.findall(r"[<>]|\\[lg]e", latex)) > MAX_RELATIONS


def _constants_are_equal(first, second) -> bool | None:
    """None where one is no constant."""
    import sympy

    if not all(isinstance(one, sympy.Expr) and not one.free_symbols for one in (first, second)):
        return None
    if any(one.has(sympy.core.function.AppliedUndef) for one in (first, second)):
        return None
    first, second = (_whole(one) for one in (first, second))
    if first == second:
        return True
    size = max(_bits(one) for one in (first, second))
    first, second = (one.doit() for one in (first, second))
    if first.is_Rational and second.is_Rational:
        return first == second
    digits = 50 + int(size * math.log10(2))
    if digits > 5000:
        return bool(first == second)
    values = [one.evalf(digits) for one in (first, second)]
    if any(value.has(sympy.nan, sympy.zoo) or not value.is_number for value in values):
        return bool(first == second)
    if any(value.has(sympy.oo, -sympy.oo) for value in values):
        return bool(values[0] == values[1])
    apart, whole = abs(values[0] - values[1]), max(abs(value) for value in values)
    return bool(apart <= whole * sympy.Float(10, 20) ** (-(digits - 15)))


def _whole(expression):
    """Decimals as the fractions that they are."""
    import sympy

    floats = expression.atoms(sympy.Float)
    return expression.xreplace({one: sympy.Rational(str(one)) for one in floats}) if floats else expression


def _bits(expression) -> float:
    """An upper bound of the size of a constant, and of all that is worked out on the way to it."""
    import sympy

    if getattr(expression, "is_Rational", False):
        return expression.p.bit_length() + expression.q.bit_length()
    parts = [_bits(part) for part in expression.args]
    if isinstance(expression, sympy.Pow):
        return max(parts[0], 1.0) * 2.0 ** parts[1] if parts[1] < 64 else math.inf
    if isinstance(expression, sympy.factorial):
        return parts[0] * 2.0 ** parts[0] if parts[0] < 64 else math.inf
    return sum(parts) + 4
