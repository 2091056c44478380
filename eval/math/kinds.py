r"""Which kind of answer a text is, in the spelling of `plain`.

Each kind is compared by its own rule in ``scoring.py``: a float tolerance that suits a decimal would take ``11_2`` for
``11_3``, and a set for a pair.
"""

import re

from modeling_deepseek_moe.eval.math import words
from modeling_deepseek_moe.eval.math.answers import (
    Answer,
    Day,
    Expression,
    Grid,
    Parts,
    Several,
    Words,
    inner,
    name_and_rest,
    split,
)
from modeling_deepseek_moe.eval.math.numbers import number, numeral, with_unit

_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_COLONS = re.compile(
    r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+)\s*(?:\\text\{)?\s*([ap])?\.?\s*(m)?\.?\s*\}?", re.IGNORECASE
)
_AND = re.compile(
    r"\\text\s*\{\s*,?\s*(?:and|or|und|oder|et|ou|y|o|или|и)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\&|[或和与及]|\\(?:lor|vee|land)(?![A-Za-z])"
)
_OPEN = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle", "]": "["}
_GRID = re.compile(
    r"[\[(]?\s*\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{(?:[pbB]?matrix|smallmatrix|array)\}\s*[\])]?",
    re.DOTALL,
)
_DATES = (
    re.compile(r"(?P<month>[A-Za-z]{3,9})\.? (?P<day>\d{1,2})(?:st|nd|rd|th)?(?:,? (?P<year>\d{4}))?"),
    re.compile(
        r"(?:the )?(?P<day>\d{1,2})(?:st|nd|rd|th)?(?: of)? (?P<month>[A-Za-z]{3,9})\.?(?:,? (?P<year>\d{4}))?"
    ),
    re.compile(r"(?P<month>[A-Za-z]{3,9})\.? (?P<year>\d{4})"),
    re.compile(r"(?:(?P<year>\d{4}) ?年 ?)?(?P<month>\d{1,2}) ?月 ?(?P<day>\d{1,2}) ?[日号]"),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})"),
)


def readings(text: str) -> list[Answer]:
    """The answer, and again as a list where ``100,101`` may be that too, besides one number with its thousands apart."""
    grouped = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    if text.startswith(tuple(_OPEN)):  # within brackets commas divide
        return [read(text)]
    return [read(grouped), read(text)] if grouped != text else [read(text)]


def read(text: str) -> Answer:
    """The kind of an answer in the spelling of `plain`."""
    text = inner(text)
    for kind in (_day, _parts, _grid, _named_list, numeral, number):
        if (found := kind(text)) is not None:
            return found
    for kind in (_union, _bracketed, _listed, _plus_minus, _words, _measured):
        if (found := kind(text)) is not None:
            return found
    return Expression(text)


def _is_balanced(inside: str) -> bool:
    """Whether no bracket closes that was opened before ``inside``: not so in ``0,9),(9,36``."""
    depth = 0
    for mark in re.findall(r"\\[{}]|\\[lr]angle|[()\[\]]", inside):
        depth += 1 if mark in ("(", "[", r"\{", r"\langle") else -1
        if depth < 0:
            return False
    return True


def _day(text: str) -> Day | None:
    bare = re.sub(r"\s+", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text.replace("^", "")))
    bare = re.sub(r"[{}]", "", bare).strip()
    bare = re.sub(r"^on (?:the )?", "", bare)
    head, comma, rest = bare.partition(",")
    if comma and words.weekday(head.strip().casefold()):
        bare = rest.strip()
    bare = re.sub(r" ?, ?", ", ", re.sub(r"(\d) (st|nd|rd|th)\b", r"\1\2", bare))
    for pattern in _DATES:
        if found := pattern.fullmatch(bare):
            said = found.groupdict()
            month = int(said["month"]) if said["month"].isdigit() else words.month(said["month"])
            if not 1 <= month <= 12:
                continue
            day, year = (int(said[name]) if said.get(name) else None for name in ("day", "year"))
            return Day(month, day, year)
    return None


def _parts(text: str) -> Parts | None:
    whole = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    found = _COLONS.fullmatch(whole[1].strip() if whole else text)
    if not found or bool(found[2]) != bool(found[3]):
        return None
    half = (found[2] or "").lower()
    return Parts(tuple(part.strip() for part in found[1].split(":")), half and half + "m")


def _grid(text: str) -> Grid | None:
    found = _GRID.fullmatch(text)
    if not found or "\\begin" in found[1]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", found[1]) if row.strip()]
    return Grid(tuple(tuple(read(cell.strip()) for cell in row.replace(r"\hline", "").split("&")) for row in rows))


def _union(text: str) -> Several | None:
    items = split(text, re.compile(r"\\cup(?![A-Za-z])"))
    return Several(tuple(read(item) for item in items), "union") if len(items) > 1 else None


def _bracketed(text: str) -> Several | None:
    _, text = name_and_rest(text)
    text = re.sub(r"^[A-Z]\s*(?=\()", "", text)  # a point with its name
    for opener in _OPEN:
        if not text.startswith(opener):
            continue
        for closer in (")", "]", r"\}", r"\rangle", "["):
            if not text.endswith(closer):
                continue
            inside = text[len(opener) : len(text) - len(closer)].strip()
            if not _is_balanced(inside):
                return None
            if not inside and opener == r"\{":
                return Several((), "{}")
            items = split(inside, re.compile(r"[,;]|\\text\{\s*,?\s*and\s*\}"))
            if (
                min(map(len, items)) == 0
                or (len(items) == 1 and opener != r"\{")
                or r"\mid" in inside
                or "|" in inside
            ):
                return None
            ends = {r"\{": "{", r"\langle": "(", "]": "("}.get(opener, opener)
            ends += {r"\}": "}", r"\rangle": ")", "[": ")"}.get(closer, closer)
            return Several(_spread(items), ends) if ends in ("{}", "()", "[]", "(]", "[)") else None
    return None


def _named_list(text: str) -> Several | None:
    r"""``n = 2, 3, 4``: one name, and then a list."""
    name, rest = name_and_rest(text)
    return _listed(rest) if name else None


def _listed(text: str) -> Several | None:
    bare = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    if bare and re.search(r",|\band\b|\bor\b", bare[1]):  # words in a list: \text{C, E}
        items = [one for one in re.split(r"\s*(?:,|;|\band\b|\bor\b|&)\s*", bare[1]) if one]
        if len(items) > 1 and max(len(item) for item in items) < 30:
            return Several(tuple(read(rf"\text{{{item}}}") for item in items))
        return None
    text = _AND.sub(" , ", text)
    items = [item for item in split(text, re.compile(r"[,;]|\\\\|\n")) if item]
    if len(items) < 2 or any(
        item.startswith(r"\text") and re.match(r"\\text\{\s*(?:if|where|for|when)\b", item) for item in items
    ):
        return None
    names = tuple(name_and_rest(item)[0] for item in items)
    return Several(_spread(items), names=names if all(names) and len(set(names)) == len(names) else ())


def _plus_minus(text: str) -> Several | None:
    return Several(_spread([text])) if re.search(r"\\[pm][mp](?![A-Za-z])", text) else None


def _spread(items: list[str]) -> tuple[Answer, ...]:
    r"""Each answer read; ``1 \pm 2`` is two."""
    found = []
    for item in items:
        if r"\pm" in item or r"\mp" in item:
            upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", item))
            lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", item))
            found += [read(upper), read(lower)]
        else:
            found.append(read(item))
    return tuple(found)


def _words(text: str) -> Words | None:
    """Only words, in ``\\text`` or in a script that formulas are not in."""
    outside = re.sub(r"\\text\s*\{[^{}]*\}", "", text)
    if re.fullmatch(r"[\s.,:()\-]*", outside) and "\\text" in text:
        return Words(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text))
    if re.search(r"[^\x00-\x7f]", outside) and re.fullmatch(r"[^\\^_=<>+*/{}\d]*", outside):
        return Words(text)
    return None


def _measured(text: str) -> Expression | None:
    rest, unit, factor = with_unit(text)
    return Expression(rest, unit) if unit is not None and factor == 1 else None
