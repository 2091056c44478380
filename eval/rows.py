"""What a row of a benchmark must hold: a rule for each column, and what columns must be together.

A rule takes a value and returns what was wanted in its place, or None where it is as it should be.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from modeling_deepseek_moe.eval import extraction

LETTERS = "ABCDEFGHIJ"
ABSENT = "N/A"  # MMLU-Pro's mark of an option that is none; it is left out, as the authors' script does
Rule = Callable[[Any], str | None]
_MISSING = (
    "none",
    "null",
    "nan",
    "n/a",
    "na",
    "<na>",
    "nil",
    "undefined",
)  # what programs write where there is no value


def text(value: Any) -> str | None:
    """Text with something in it that UTF-8 can hold."""
    if not isinstance(value, str) or not value.strip():
        return "text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "text without half a surrogate"
    return None


def perhaps_text(value: Any) -> str | None:
    return None if value is None or value == "" else text(value)


def name(value: Any) -> str | None:
    """What an id may be."""
    return None if _is_number(value) or text(value) is None else "a name or a number"


def answer(value: Any) -> str | None:
    """A number, or text other than the word for a missing value."""
    if _is_number(value) or (text(value) is None and value.strip().lower() not in _MISSING):
        return None
    return "the answer, as text or a number"


def option(value: Any) -> str | None:
    return None if _is_number(value) or text(value) is None else "text or a number"


def contest_answer(value: Any) -> str | None:
    """AIME's: a whole number of at most three digits; text may have a unit."""
    wanted = "a whole number from 0 to 999"
    if answer(value) is not None:
        return wanted
    try:
        number = float(value)
    except ValueError:
        return None if any(letter.isdigit() for letter in str(value)) else wanted
    return None if number.is_integer() and 0 <= number <= 999 else wanted


def options(value: Any) -> str | None:
    """Two to ten of them besides those that are `ABSENT`."""
    if not isinstance(value, list | tuple):  # a CSV file holds text
        return "a list: JSON lines or parquet hold one"
    for number, one in enumerate(value, 1):
        if wanted := option(one):
            return f"{wanted} as option {number}"
    count = sum(one != ABSENT for one in value)
    return None if 2 <= count <= len(LETTERS) else f"2 to {len(LETTERS)} options"


def boxed_solution(value: Any) -> str | None:
    return None if text(value) is None and extraction.boxed(value) else "a solution with its answer in \\boxed{}"


def multiple_choice(row: dict, given: dict) -> tuple[str, object, str] | None:
    """Column, value and what was wanted, where MMLU-Pro's columns contradict each other; ``given`` has those that are not needed too."""
    count = sum(one != ABSENT for one in row["options"])
    letters = LETTERS[:count]
    letter = row["answer"]
    if not isinstance(letter, str) or letter not in tuple(letters):
        return "answer", letter, f"one of its {count} options, {letters!r}"
    place = LETTERS.index(letter)
    if ABSENT in row["options"][: place + 1]:
        return "options", ABSENT, f"none before the answer {letter}, whose letter it shifts"
    index = given.get("answer_index")
    if index is not None and index not in (place, str(place)):
        return "answer_index", index, f"{place}, the place of the answer {letter}"
    return None


def check(
    rows: Sequence[tuple[int, dict]],
    rules: dict[str, Rule],
    where: object,
    identity: str | None,
    names: dict[str, str],
) -> None:
    """
    Args:
        rows: number and columns of each.
        identity: the column that names a row.
        names: what the columns are called in the file.

    Raises:
        ValueError: file, row, column, what was found and what was wanted.
    """
    first: dict[str, int] = {}
    for number, row in rows:
        for column, rule in rules.items():
            if wanted := rule(row[column]):
                raise unfit(where, number, names[column], row[column], wanted)
        if identity is not None:
            label = str(row[identity])
            if label in first:
                raise unfit(
                    where, number, names[identity], row[identity], f"an id of its own: row {first[label]} has this one"
                )
            first[label] = number


def unfit(where: object, number: int, column: str, value: object, wanted: str) -> ValueError:
    found = "null" if value is None else repr(value)
    found = found if len(found) <= 80 else found[:77] + "..."
    return ValueError(f"{where}: row {number}: {column}: found {found}, wanted {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
