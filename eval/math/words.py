"""Words in answers to MATH problems: units, numbers in words, months, and what a few words are in Chinese.

A unit is its name and power: ``square inches`` and ``in^2`` are ``("in", 2)``. Small on purpose: a word that is not here is
itself, and a unit that is not here agrees with every unit.
"""

import re
from fractions import Fraction

_UNITS = {
    "cm": "cm centimeter centimetre centimeters centimetres 厘米 公分 センチ センチメートル см сантиметр сантиметров 센티미터",
    "mm": "mm millimeter millimetre millimeters millimetres 毫米 мм",
    "km": "km kilometer kilometre kilometers kilometres 千米 公里 キロメートル км",
    "m": "m meter metre meters metres 米 メートル м метр метров 미터",
    "in": "in inch inches 英寸 дюйм дюймов",
    "ft": "ft foot feet 英尺 фут футов",
    "yd": "yd yard yards 码",
    "mi": "mi mile miles 英里 миль",
    "deg": "degree degrees deg 度 градус градуса градусов 도 grad",
    "rad": "rad radian radians 弧度",
    "dollar": "dollar dollars usd buck bucks 美元 美金",
    "cent": "cent cents 美分",
    "s": "s sec secs second seconds 秒 секунд",
    "min": "min mins minute minutes 分钟 минут",
    "h": "h hr hrs hour hours 小时 часов",
    "day": "day days 天 日 дней",
    "week": "week weeks 周 星期",
    "month": "month months 个月",
    "year": "year years 年 岁",
    "g": "g gram grams 克",
    "kg": "kg kilogram kilograms 千克 公斤 кг",
    "lb": "lb lbs pound pounds 磅",
    "oz": "oz ounce ounces 盎司",
    "L": "l liter litre liters litres 升",
    "mL": "ml milliliter millilitre milliliters millilitres 毫升",
    "gal": "gal gallon gallons 加仑",
    "mph": "mph milesperhour",
    "km/h": "km/h kmh kph kilometersperhour",
    "m/s": "m/s meterspersecond",
    "unit": "unit units 单位 个单位",
}
UNITS = {spelling: name for name, spellings in _UNITS.items() for spelling in spellings.split()}
PERCENT = ("%", "percent", "per cent", "percentage", "pct", "percents", "百分", "процентов", "процента", "パーセント")
_POWERS = {
    "square": 2,
    "sq": 2,
    "squared": 2,
    "cubic": 3,
    "cu": 3,
    "cubed": 3,
    "平方": 2,
    "立方": 3,
    "кв": 2,
    "куб": 3,
}
SCALES = {
    **{"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"百": 100, "千": 10**3, "万": 10**4, "百万": 10**6, "亿": 10**8, "萬": 10**4, "億": 10**8, "тысяч": 10**3},
}
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = [
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
]
_SMALL = {
    **{name: i for names in (_ONES, _ORDINALS) for i, name in enumerate(names)},
    **{name: 10 * i for i, name in enumerate(_TENS, 2)},
    **{name[:-1] + "ieth": 10 * i for i, name in enumerate(_TENS, 2)},
    **{
        f"{tens} {one}": 10 * i + j
        for i, tens in enumerate(_TENS, 2)
        for names in (_ONES, _ORDINALS)
        for j, one in enumerate(names[:10])
        if j
    },
}
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_MEANINGS = {
    "even": "偶 偶数 偶函数",
    "odd": "奇 奇数 奇函数",
    "neither": "非奇非偶 非奇非偶函数 都不是 两者都不是",
    "yes": "是 是的",
    "no": "否 不是",
    "true": "真 正确 对",
    "false": "假 错误 错",
    "none": "无",
    "ellipse": "椭圆",
    "parabola": "抛物线",
    "hyperbola": "双曲线",
    "circle": "圆",
    "line": "直线",
    "point": "点",
    "two lines": "两条直线",
    "east": "东 东方",
    "west": "西 西方",
    "north": "北 北方",
    "south": "南 南方",
    **{day: f"星期{char} 周{char}" for day, char in zip(WEEKDAYS, "一二三四五六日", strict=True)},
}
MEANINGS = {spelling: meaning for meaning, spellings in _MEANINGS.items() for spelling in spellings.split()}


def word(text: str) -> str:
    """A word or a few in one spelling: no case, marks, article or "function" at the end; translated where it is known."""
    bare = re.sub(r"[\s\-_.,;:!?'\"(){}\\]+", " ", text.casefold()).strip()
    bare = re.sub(r"^(?:the|an?) (?=\w)", "", bare).removesuffix(" function")
    return MEANINGS.get(bare, weekday(bare) or bare)


def weekday(text: str) -> str:
    """The whole name of a day of the week, of which three letters are enough; empty for any other word."""
    return next((day for day in WEEKDAYS if len(text) >= 3 and text in (day, day[:3], day[:4], day[:5])), "")


def month(text: str) -> int:
    """1 to 12 for the name of a month, of which three letters are enough; 0 for any other word."""
    bare = text.casefold().strip(". ")
    return next((i for i, name in enumerate(MONTHS, 1) if bare in (name, name[:3], name[:4])), 0)


def number(text: str) -> int | None:
    """What "twenty-one", "ninth" or "two hundred" says; None for any other words."""
    rest, total, found = re.sub(r"[\s\-]+", " ", text.casefold()).replace(" and ", " ").strip(), 0, False
    for scale_word in ("million", "thousand", "hundred"):
        head, named, tail = rest.partition(scale_word)
        if named:
            if head.strip() not in _SMALL:
                return None
            total, rest, found = total + _SMALL[head.strip()] * SCALES[scale_word], tail.strip(), True
    if rest in _SMALL:
        return total + _SMALL[rest]
    return total if found and not rest else None


def unit(text: str) -> tuple[str, int]:
    """Name and power. A unit that is not in the table has its own spelling for a name, and power 0: unknown."""
    bare = re.sub(r"\\text|[{}.\s\\]", " ", text.casefold())
    power, words = 1, []
    if raised := re.search(r"\^ *(-?\d+) *$", bare):
        power, bare = int(raised[1]), bare[: raised.start()]
    for one in bare.split():
        for prefix in ("平方", "立方", "кв", "куб"):
            if one.startswith(prefix) and len(one) > len(prefix):
                power, one = _POWERS[prefix], one.removeprefix(prefix)
        if one in _POWERS:
            power = _POWERS[one]
        else:
            words.append(one)
    name = "".join(words)
    return (UNITS[name], power) if name in UNITS else (name, 0)


def scale(text: str) -> tuple[int, str]:
    """The factor that words begin with, as in "million dollars", and the rest."""
    rest, factor = text.strip(), Fraction(1)
    while found := next((s for s in sorted(SCALES, key=len, reverse=True) if _begins(rest, s)), None):
        factor, rest = factor * SCALES[found], rest[len(found) :].strip()
    return int(factor), rest


def _begins(text: str, word: str) -> bool:
    if not text.casefold().startswith(word):
        return False
    return not word.isascii() or not text[len(word) : len(word) + 1].isalpha()
