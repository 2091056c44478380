r"""What an answer to a MATH problem can be: a number, a numeral in a base, a date, words, several answers, or an expression.

And how its text falls into parts: names before ``=``, brackets, and what stands between commas outside of them.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from modeling_deepseek_moe.eval.math.spelling import closing


@dataclass(frozen=True)
class Number:
    """A rational, exactly. ``unit``: as `words.unit` has it, ``("%", 1)`` for per cent; None without one."""

    value: Fraction
    unit: tuple[str, int] | None = None


@dataclass(frozen=True)
class Numeral:
    """Digits in a base, as in ``2516_8``."""

    digits: str
    base: int


@dataclass(frozen=True)
class Day:
    """A date; what is not said is None. ``weekday`` alone is a word, not a date."""

    month: int
    day: int | None
    year: int | None = None


@dataclass(frozen=True)
class Parts:
    """Numbers with colons: a time of day, or a ratio. ``half``: "am", "pm" or nothing."""

    numbers: tuple[str, ...]
    half: str = ""


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Several:
    r"""Answers in order. ``ends``: the brackets, "" for a bare list, "{}" for a set, "union" for a union, "()" for a pair or an
    open interval. ``names``: what stands before ``=`` of each, where each has a name of its own; else empty."""

    items: tuple["Answer", ...]
    ends: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A matrix by rows."""

    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Expression:
    """Anything else, as LaTeX. ``unit`` as of a `Number`."""

    latex: str
    unit: tuple[str, int] | None = None


Answer = Number | Numeral | Day | Parts | Words | Several | Grid | Expression

_NAME = r"(?:[A-Za-z](?:_\{?\w+\}?)?'*|\\(?:text\{[^{}]*\}|[a-z]+)(?:_\{?\w+\}?)?)"
_NAMED = re.compile(
    rf"({_NAME}(?:\s*\([A-Za-z0-9, ]+\))?|\\angle\s*[A-Z]+|\([A-Za-z](?:,\s*[A-Za-z])+\)|[A-Z]{{1,4}}|\|?[A-Za-z]{{1,2}}\|?)\s*(?:=|:=|\\in|\\equiv)\s*(?![=<>])"
)


def name_and_rest(text: str) -> tuple[str, str]:
    """``x`` and ``5`` of ``x = 5``; no name where something else stands before the sign, or more than one sign."""
    found = _NAMED.match(text)
    if found and not re.search(r"=|\\le|\\ge|<|>", text[found.end() :]):
        return found[1].strip(), text[found.end() :].strip()
    return "", text


def split(text: str, mark: re.Pattern) -> list[str]:
    """The parts between the marks that stand outside all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if depth == 0 and (found := mark.match(text, position)) and found.end() > position:
            parts.append(text[start:position])
            start = position = found.end()
            continue
        step = 2 if text[position] == "\\" else 1
        piece = text[position : position + step]
        if text.startswith((r"\langle", r"\rangle"), position):
            depth += 1 if text.startswith(r"\langle", position) else -1
        depth += (piece in ("(", "[", "{", r"\{")) - (piece in (")", "]", "}", r"\}"))
        position += step
    return [part.strip() for part in (*parts, text[start:])]


def inner(text: str) -> str:
    """Without braces and brackets that hold all of one answer: ``(5)`` is 5."""
    text = text.strip()
    while text[:1] in ("(", "{") and closing(text, 0) == len(text) - 1 and text[-1] == {"(": ")", "{": "}"}[text[0]]:
        inside = text[1:-1].strip()
        if text[0] == "(" and (
            len(split(inside, re.compile(r"[,;]"))) > 1 or not re.search(r"\d", inside) or "\\text" in inside
        ):
            break
        text = inside
    return text
