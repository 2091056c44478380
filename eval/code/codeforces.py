"""Codeforces: submissions for the judge, and from judged ones a rating and, by a table of the user's, a percentile.

Only the site's judge has the tests, so nothing is judged here, and no figure is made without its verdicts.
"""

import csv
import itertools
import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path

from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.eval.code.problems import program

SPREAD = 400  # rating points for odds of ten to one, as everywhere in Elo's scale
RANGE = (-1000, 6000)


def write_submissions(file: Path, texts: Iterable[tuple[str, str]]) -> tuple[int, int]:
    """One JSON line a text: ``{"problem", "language", "program"}``. How many, and how many texts had no program.

    Args:
        texts: problem (such as ``"1998A"``) and what the model wrote.
    """
    lines, missing = [], 0
    for problem, text in texts:
        source = program(text)
        missing += source is None
        if source is not None:
            lines.append(json.dumps({"problem": problem, "language": "python3", "program": source}) + "\n")
    write_file(Path(file), "".join(lines))
    return len(lines), missing


def read_judged(file: Path) -> dict[str, tuple[float, bool]]:
    """Problem -> its rating, and whether it was solved, from JSON lines ``{"problem", "rating", "solved"}``.

    Raises:
        ValueError: a line has no problem, rating or verdict, or a problem comes twice; the message names it.
    """
    judged = {}
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                name, rating, solved = row["problem"], row["rating"], row["solved"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}:{number}: no judged submission: {error}; wanted problem, rating, solved"
                ) from None
            if not isinstance(solved, bool) or isinstance(rating, bool) or not isinstance(rating, int | float):
                raise ValueError(
                    f"{file}:{number}: found rating {rating!r} and solved {solved!r}, wanted a number and a bool"
                )
            if name in judged:
                raise ValueError(f"{file}:{number}: found {name!r} twice, wanted one verdict a problem")
            judged[name] = (float(rating), solved)
    if not judged:
        raise ValueError(f"{file}: found no judged submissions")
    return judged


def rating(judged: Collection[tuple[float, bool]]) -> float:
    """The rating under which as many problems are expected solved as were: its maximum-likelihood estimate.

    P(solved) = 1 / (1 + 10^((problem - rating) / 400)); the sum of P over the problems equals the number solved.

    Raises:
        ValueError: all or none were solved: no rating is the likeliest.
    """
    solved = sum(verdict for _, verdict in judged)
    if solved in (0, len(judged)):
        raise ValueError(f"found {solved} of {len(judged)} solved: a rating needs some solved and some not")
    low, high = RANGE
    for _ in range(60):
        middle = (low + high) / 2
        expected = sum(1 / (1 + math.pow(10, (problem - middle) / SPREAD)) for problem, _ in judged)
        low, high = (middle, high) if expected < solved else (low, middle)
    return (low + high) / 2


def percentile(value: float, table: Path) -> float:
    """Share in percent of competitors below a rating, from a CSV table ``rating,percentile`` of the user's, between its rows linearly.

    Raises:
        ValueError: the table does not rise, or does not reach the rating.
    """
    with Path(table).open(encoding="utf-8", newline="") as lines:
        try:
            rows = sorted((float(row["rating"]), float(row["percentile"])) for row in csv.DictReader(lines))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{table}: {error}; wanted columns rating and percentile, all numbers") from None
    if len(rows) < 2 or any(a[1] > b[1] or a[0] == b[0] for a, b in itertools.pairwise(rows)):
        raise ValueError(f"{table}: found {len(rows)} rows that do not rise, wanted at least two that do")
    if not rows[0][0] <= value <= rows[-1][0]:
        raise ValueError(
            f"{table}: found ratings {rows[0][0]:.0f} to {rows[-1][0]:.0f}, wanted {value:.0f} among them"
        )
    for (low, below), (high, above) in itertools.pairwise(rows):
        if value <= high:
            return below + (above - below) * (value - low) / (high - low)
    raise AssertionError
