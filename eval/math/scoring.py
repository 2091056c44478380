r"""Is an answer to a MATH problem right: exactly where both are numbers, by kind where it has one, else by math-verify.

The gold is that of the ``answer`` column, never parsed from the solution: there ``\boxed{25\%}`` misparses and marks right
answers wrong. What passes though it is spelled otherwise is listed in docs/evaluation.md, each with its line.
"""

import re
from fractions import Fraction

from modeling_deepseek_moe.eval.extraction import boxes, labelled_answer
from modeling_deepseek_moe.eval.math import words
from modeling_deepseek_moe.eval.math.answers import (
    Answer,
    Day,
    Expression,
    Grid,
    Number,
    Numeral,
    Parts,
    Several,
    Words,
    name_and_rest,
)
from modeling_deepseek_moe.eval.math.expressions import expressions_are_equal, load_math_verify
from modeling_deepseek_moe.eval.math.kinds import readings
from modeling_deepseek_moe.eval.math.spelling import plain

MAX_ANSWER = 2000  # characters: an answer longer than any in the benchmark is no answer, and costs parsing time
_IMAGINARY, _ENGINEERS = (re.compile(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])") for letter in ("i", "[jI]"))
_CHOICE = re.compile(r"\(?\s*([A-J])\s*(?:$|\)\s*$|\)[\s.:,]|[.:)]\s)")
_LETTER = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?")
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_FLIPPED = {"<": "<", r"\le": r"\le", ">": "<", r"\ge": r"\le"}


def math_answer(text: str) -> str | None:
    """What the text gives as its answer, or None.

    It is the last box that closes; boxes that only commas, "and", "or" and names of variables divide are several answers, and
    are read as a list. Without any box, it is what follows "Answer:" on the last such line.
    """
    found = boxes(text)
    kept: list[str] = []
    for one in found:
        if not any(one == other or (len(found) < 9 and is_equal(other, one)) for other in kept):
            kept.append(one)
    # said again in another form, as in \boxed{2/4} = \boxed{1/2}: the last form stands
    answer = ", ".join(kept) if len(kept) > 1 else found[-1] if found else labelled_answer(text)
    return answer if answer and len(answer) <= MAX_ANSWER else None


def is_right(gold: str, text: str) -> bool:
    """Whether the answer that a model's ``text`` gives is the gold."""
    answer = math_answer(text)
    return answer is not None and is_equal(gold, answer)


def is_equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers, without box or dollar signs, mean the same.

    Raises:
        ImportError: math-verify is missing.
    """
    load_math_verify()
    wanted, given = plain(gold), plain(answer)
    if not wanted or not given or len(given) > MAX_ANSWER:
        return False
    if "".join(wanted.split()) == "".join(given.split()):
        return True
    if _IMAGINARY.search(wanted) and not _ENGINEERS.search(wanted) and not _IMAGINARY.search(given):
        given = _ENGINEERS.sub("i", given)
    sides = _sides(wanted, given)
    return sides is not None and any(_same(one, other) for one in readings(sides[0]) for other in readings(sides[1]))


def _sides(wanted: str, given: str) -> tuple[str, str] | None:
    """Without the names before ``=`` where one side has none; None where the two name different variables."""
    (name, rest), (other, value) = name_and_rest(wanted), name_and_rest(given)
    if name and other:
        if name != other and re.fullmatch(_LETTER, name) and re.fullmatch(_LETTER, other):
            return None
        return rest, value
    if other and "=" not in wanted:
        return wanted, value
    if "=" not in wanted and "=" in given and not re.search(r"[,;]|\\text|\\begin|\\ne", given):
        return wanted, given.rpartition("=")[2].strip()  # a chain: its end is the answer
    if name and "=" not in given:
        return rest, given
    return wanted, given


def _same(gold: Answer, given: Answer) -> bool:
    match gold, given:
        case Number(), Number():
            return _numbers(gold, given)
        case Numeral(), Numeral():
            return gold == given
        case Numeral(), Number(unit=None):  # the base is left out
            return gold.digits == str(given.value)
        case Number(unit=None), Numeral(base=10):
            return str(gold.value) == given.digits
        case Day(), Day():
            return (gold.month, gold.day) == (given.month, given.day) and gold.year in (None, given.year)
        case Parts(), Parts():
            return _parts(gold, given)
        case Parts(numbers=(first, second), half=""), Number(unit=None):
            return Fraction(second) != 0 and Fraction(first) / Fraction(second) == given.value
        case Number(unit=None), Parts(numbers=(first, second), half=""):
            return Fraction(second) != 0 and Fraction(first) / Fraction(second) == gold.value
        case Grid(), Grid():
            return [len(row) for row in gold.rows] == [len(row) for row in given.rows] and all(
                _same(one, other)
                for row, theirs in zip(gold.rows, given.rows, strict=True)
                for one, other in zip(row, theirs, strict=True)
            )
        case Several(), _:
            return _several(gold, given)
        case _, Several(items=(only,), ends="{}"):
            return _same(gold, only)
        case _, Several():
            return isinstance(gold, Expression) and _ranges(gold, given)
        case (Words(), _) | (_, Words()):
            return _words(gold, given)
        case (Expression(unit=ours), Expression(unit=theirs) | Number(unit=theirs)) | (
            Number(unit=ours),
            Expression(unit=theirs),
        ):
            alike = _chosen(gold, given) or expressions_are_equal(_latex(gold), _latex(given))
            return alike and _units(ours, theirs)
    return False


def _numbers(gold: Number, given: Number) -> bool:
    per_cent = [one.unit is not None and one.unit[0] == "%" for one in (gold, given)]
    if per_cent == [True, False]:
        return given.unit is None and given.value in (gold.value, gold.value / 100)
    if per_cent == [False, True]:
        if gold.unit is not None:
            return False
        # "what per cent" may have 25 for a gold; a gold up to 1 is a share
        return given.value / 100 == gold.value or (given.value == gold.value and abs(gold.value) > 1)
    return gold.value == given.value and _units(gold.unit, given.unit)


def _units(gold: tuple[str, int] | None, given: tuple[str, int] | None) -> bool:
    """A unit may be left out or added, and one that the table lacks is taken on trust; two known ones must be the same."""
    if gold is None or given is None or 0 in (gold[1], given[1]):
        return gold == given or gold is None or given is None or "%" not in (gold[0], given[0])
    return gold == given


def _parts(gold: Parts, given: Parts) -> bool:
    """A time of day exactly; a ratio in proportion."""
    if len(gold.numbers) != len(given.numbers) or gold.half not in ("", given.half):
        return False
    ours, theirs = (tuple(Fraction(one) for one in parts.numbers) for parts in (gold, given))
    if ours == theirs:
        return True
    clock = gold.half or given.half or any(re.match(r"0\d", one) for one in (*gold.numbers, *given.numbers))
    if clock or not all((*ours, *theirs)):
        return False
    return len({one / other for one, other in zip(ours, theirs, strict=True)}) == 1


def _several(gold: Several, given: Answer) -> bool:
    if not isinstance(given, Several):
        if gold.ends == "{}" and len(gold.items) == 1:
            return _same(gold.items[0], given)
        if gold.ends == "{}" and not gold.items:
            return isinstance(given, Expression) and given.latex == r"\emptyset"
        return isinstance(given, Expression) and _ranges(gold, given)
    ordered = gold.ends not in ("", "{}", "union")
    if ordered and given.ends == "{}" and len(given.items) == 1:  # {(1, 2)}, the set of the solutions
        return _same(gold, given.items[0])
    if ordered:
        # brackets may be left out, never changed: a set is no pair, and [0, 1) is not [0, 1]
        alike = given.ends == gold.ends or (given.ends == "" and gold.ends == "()")
        return alike and _in_order(gold.items, given.items)
    if gold.ends == "union":
        return _in_any_order(gold.items, given.items) if given.ends == "union" else _ranges(gold, given)
    if given.ends not in ("", "{}"):
        return False
    if gold.names and (not given.names or set(gold.names) == set(given.names)):
        order = [given.names.index(name) for name in gold.names] if given.names else range(len(given.items))
        return _in_order(gold.items, tuple(given.items[i] for i in order))
    return _in_any_order(gold.items, given.items)


def _in_order(gold: tuple[Answer, ...], given: tuple[Answer, ...]) -> bool:
    return len(gold) == len(given) and all(_same(one, other) for one, other in zip(gold, given, strict=True))


def _in_any_order(gold: tuple[Answer, ...], given: tuple[Answer, ...]) -> bool:
    """Each as often as in the gold."""
    left = list(given)
    for one in gold:
        match = next((i for i, other in enumerate(left) if _same(one, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _ranges(gold: Answer, given: Answer) -> bool:
    """An interval or a union of them against inequalities."""
    if isinstance(gold, Expression) == isinstance(given, Expression) and not isinstance(given, Several):
        return False
    sides = [_intervals(one) for one in (gold, given)]
    if None in sides:
        return isinstance(gold, Expression) != isinstance(given, Expression) and expressions_are_equal(
            _latex(gold), _latex(given)
        )
    return _in_any_order(*sides)


def _intervals(answer: Answer) -> tuple[Answer, ...] | None:
    if isinstance(answer, Expression):
        found = _interval(answer.latex)
        return None if found is None else (found,)
    if not isinstance(answer, Several):
        return None
    if answer.ends in ("()", "[]", "(]", "[)"):
        return (answer,)
    made = [_intervals(item) for item in answer.items]
    return None if None in made else tuple(one for part in made for one in part)


def _interval(latex: str) -> Several | None:
    r"""``(2, 3]`` of ``2 < x \le 3``; None where it is no such chain of one variable."""
    signs, terms = _RELATION.findall(latex), [term.strip() for term in _RELATION.split(latex)]
    if len({_FLIPPED[sign] != sign for sign in signs}) != 1:
        return None
    if signs[0] in (">", r"\ge"):
        signs, terms = [_FLIPPED[sign] for sign in reversed(signs)], terms[::-1]
    if len(terms) == 2:
        if re.fullmatch(_LETTER, terms[0]):
            signs, terms = ["<", *signs], [r"-\infty", *terms]
        else:
            signs, terms = [*signs, "<"], [*terms, r"\infty"]
    if len(terms) != 3 or not re.fullmatch(_LETTER, terms[1]):
        return None
    low, high = (readings(term)[0] for term in (terms[0], terms[2]))
    return Several((low, high), ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]"))


def _words(gold: Answer, given: Answer) -> bool:
    first, second = (_text(one) for one in (gold, given))
    if not first or not second:
        return False
    return words.word(first) == words.word(second) or _chosen(gold, given)


def _chosen(gold: Answer, given: Answer) -> bool:
    """The letter of an option, with or without what the option says."""
    letter, other = (_CHOICE.match(_text(one)) for one in (gold, given))
    return bool(letter and other and letter.end() == len(_text(gold)) and letter[1] == other[1])


def _text(answer: Answer) -> str:
    text = answer.text if isinstance(answer, Words) else getattr(answer, "latex", "")
    return re.sub(r"\s+", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1 ", text)).strip()


def _latex(answer: Answer) -> str:
    if isinstance(answer, Number):
        above, below = answer.value.numerator, answer.value.denominator
        return str(above) if below == 1 else rf"\frac{{{above}}}{{{below}}}"
    if isinstance(answer, Several):
        inside = [_latex(item) for item in answer.items]
        if answer.ends == "union":
            return r" \cup ".join(inside)
        marks = {"{": r"\{", "}": r"\}"}
        ends = answer.ends or "  "
        return marks.get(ends[0], ends[0]) + ", ".join(inside) + marks.get(ends[1], ends[1])
    return getattr(answer, "latex", "")
