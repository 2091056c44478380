r"""Numbers in an answer to a MATH problem, exactly: digits, fractions, endless decimals, words, bases, and units after them."""

import re
from fractions import Fraction

from modeling_deepseek_moe.eval.math import words
from modeling_deepseek_moe.eval.math.answers import Number, Numeral, inner, name_and_rest
from modeling_deepseek_moe.eval.math.spelling import ends_in_dots

_INTEGER = r"\d+"
_DECIMAL = r"\d+(?:\.\d*)?|\.\d+"
_FRACTION = re.compile(r"\\frac\s*(?:\{\s*(-?\d+)\s*\}|\s(\d)|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d)|\s(\d))")
_MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)")
_RATIO = re.compile(r"\{?\s*(-?\d+)\s*\}?\s*/\s*\{?\s*(-?\d+)\s*\}?")
_SCIENTIFIC = re.compile(rf"({_DECIMAL})\s*(?:(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{{?\s*(-?\d+)\s*\}}?|[eE]([+-]?\d+))")
_ENDLESS = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overbar)\s*\{?\s*(\d+)\s*\}?|\((\d+)\))")
_BASED = re.compile(
    r"\(?\s*(?:\\text\{)?\s*([0-9A-Fa-f][0-9A-Fa-f\s]*?)\s*\}?\s*\)?\s*"
    r"(?:_\s*\{?\s*\(?\s*(?:\\text\{\s*)?(?:base[\s-]*)?\}?\s*(\d+|[a-z]+)\s*\}?\s*\)?\s*\}?"
    r"|(?:\\text\{)?\s*[,(]*\s*(?:in\s+)?base[\s-]*(?:\\text\{)?\}?\s*\$?(\d+|[a-z]+)\s*\)?\s*\}?\s*\)?)"
)
_ORDINAL = re.compile(
    r"(?:the\s+)?(\d+)\s*-?(?:\^\s*)?\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th|er|[èe]re|[èe]me|º|ª|-?[йяеа])\s*\}?\s*\}?"
    r"(?:\s*\\text\s*\{\s*[A-Za-z]+\s*\})?",
    re.IGNORECASE,
)
_CHINESE_ORDINAL = re.compile(r"第\s*(\d+)\s*(?:个|名|项|位)?")
_HUNDREDTHS = re.compile(r"百分之\s*([\d.]+)")
_TEXT_END = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(\^\s*\{?-?\d+\}?)?$")
_BARE_END = re.compile(r"(?<![A-Za-z\\])([A-Za-z]+(?:[ /][A-Za-z]+)*\.?)\s*(\^\s*\{?-?\d+\}?)?$")
_SCRIPT_END = re.compile(r"([^\x00-\x7f]+\.?(?:\s+[^\x00-\x7f]+\.?)*)\s*(\^\s*\{?-?\d+\}?)?$")
_NO_UNIT = re.compile(
    r"(?i)\b(?:or|and|if|when|for|where|not|base|more|less|least|most|than|about|to|mod|with|per cent of|only|except)\b|\d"
    r"|[或和与及]|以[上下]|左右|至少|至多|大于|小于|多个"
)


def _fraction(text: str) -> Fraction | None:
    """A rational in digits, however it is written; None for anything else."""
    sign = 1
    while text[:1] in ("+", "-"):
        sign, text = sign * (-1 if text[0] == "-" else 1), text[1:].strip()
    text = inner(text)
    if ends_in_dots(text):
        return None
    if re.fullmatch(_DECIMAL, text):
        return sign * Fraction(text.rstrip(".") if text.endswith(".") else text)
    if found := _SCIENTIFIC.fullmatch(text):
        power = int(found[2] or found[3])
        return sign * Fraction(found[1].rstrip(".")) * Fraction(10) ** power if abs(power) < 400 else None
    if found := _ENDLESS.fullmatch(text):
        return sign * _endless(found[1], found[2], found[3] or found[4])
    for pattern in (_FRACTION, _RATIO):
        if found := pattern.fullmatch(text):
            above, below = (int(group) for group in found.groups() if group is not None)
            return sign * Fraction(above, below) if below else None
    if found := _MIXED.fullmatch(text):
        whole, above, below = (int(group) for group in found.groups())
        return sign * (whole + Fraction(above, below)) if below else None
    if (found := re.match(_INTEGER, text)) and (part := _FRACTION.fullmatch(text[found.end() :].strip())):
        above, below = (int(group) for group in part.groups() if group is not None)
        return sign * (int(found[0]) + Fraction(above, below)) if below and above >= 0 else None
    return None


def _endless(whole: str, fixed: str, again: str) -> Fraction:
    """0.1666… from "0", "1" and "6"."""
    return Fraction(int(f"{whole}{fixed}{again}") - int(f"0{whole}{fixed}"), 10 ** len(fixed) * (10 ** len(again) - 1))


def number(text: str) -> Number | None:
    _, text = name_and_rest(text)
    if found := _HUNDREDTHS.fullmatch(text):
        return Number(Fraction(found[1]), ("%", 1))
    whole = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    text = whole[1].strip() if whole else text
    for pattern in (_ORDINAL, _CHINESE_ORDINAL):
        if found := pattern.fullmatch(text):
            return Number(Fraction(found[1]))
    for money, currency in ((r"\dollar", ("dollar", 1)), (r"\money", ("money", 0))):
        for stripped in (text.removeprefix(money), text.removesuffix(money)):
            if stripped != text:
                found = number(stripped.strip())
                return None if found is None or found.unit else Number(found.value, currency)
    if (value := _fraction(text)) is not None:
        return Number(value)
    if re.fullmatch(r"[A-Za-z\s-]+", text) and (said := words.number(text)) is not None:
        return Number(Fraction(said))
    rest, unit, factor = with_unit(text)
    if unit is None and factor == 1:
        return None
    value = _fraction(rest)
    if value is None and re.fullmatch(r"[A-Za-z\s-]+", rest) and (said := words.number(rest)) is not None:
        value = Fraction(said)
    return None if value is None else Number(value * factor, unit)


def with_unit(text: str) -> tuple[str, tuple[str, int] | None, int]:
    """What stands before the unit, the unit, and the factor that words like "million" are."""
    if found := re.search(r"\s*(?:\\?%|\\text\s*\{\s*\\?%\s*\})$", text):
        return text[: found.start()].strip(), ("%", 1), 1
    if found := re.search(r"\s*\^\\circ\s*$", text):
        return text[: found.start()].strip(), ("deg", 1), 1
    for pattern in (_TEXT_END, _SCRIPT_END, _BARE_END):
        found = pattern.search(text)
        if not found or not text[: found.start()].strip() or _NO_UNIT.search(re.sub(r"\^ ?-?\d", "", found[1])):
            continue
        rest, inside = text[: found.start()].strip(), found[1].strip().strip("().,")
        factor, name = words.scale(inside)
        if pattern is _BARE_END and not _is_bare_unit(name or inside, rest):
            continue
        shorter, before, more = with_unit(rest) if rest.endswith(("}", "%")) else (rest, None, 1)
        if before is not None and before[0] not in ("%", "deg") and pattern is _TEXT_END:
            rest, factor, name = shorter, factor * more, f"{before[0]} {name}"  # two commands, one unit
        if not name:
            return rest, None, factor
        if name.casefold() in words.PERCENT:
            return rest, ("%", 1), factor
        return rest, words.unit(name + (found[2] or "")), factor
    return text, None, 1


def _is_bare_unit(name: str, rest: str) -> bool:
    """Letters without ``\\text`` are variables, but for words and for known units of two letters and more after a number."""
    if _fraction(rest) is None and words.number(rest) is None:
        return False
    known = words.unit(name)[1] != 0 or name.casefold() in words.PERCENT
    return len(name) >= 2 and (known or (len(name) >= 4 and name[1:].islower()))


def numeral(text: str) -> Numeral | None:
    _, text = name_and_rest(text)
    found = _BASED.fullmatch(text)
    if not found:
        return None
    said = found[2] or found[3]
    base = int(said) if said.isdigit() else words.number(said)
    digits = re.sub(r"\s+", "", found[1]).upper().lstrip("0") or "0"
    return Numeral(digits, base) if base and 2 <= base <= 36 else None
