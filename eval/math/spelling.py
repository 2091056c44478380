r"""One spelling for the many that an answer to a MATH problem has: ``\boxed{\textbf{9}\,.}`` is ``9``.

Only what means the same is made the same here; what a reading lets pass is in ``kinds.py`` and ``scoring.py``.
"""

import re
import unicodedata
from functools import partial

_SIGNS = {
    **dict.fromkeys("−﹣－–—‐‑‒", "-"),
    **dict.fromkeys("、，", ","),
    **dict.fromkeys("。．｡", "."),
    **dict.fromkeys("’‘′", "'"),
    **dict.fromkeys("·⋅•∙", r"\cdot "),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("°˚º", r"^\circ "),
    **dict.fromkeys("ⅈⅉ𝚤ı", "i"),
    **{"÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge "},
    **{"⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "},
    **{"≈": r"\approx ", "⟨": r"\langle ", "⟩": r"\rangle ", "《": r"\langle ", "》": r"\rangle ", "∶": ":"},
    **{
        "′": "'",
        "″": "''",
        "⁄": "/",
        "∕": "/",
        "﹪": "%",
        "ℝ": r"\mathbb{R}",
        "¢": r"\text{ cents}",
        "∖": r"\setminus ",
    },
    **{"θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": ""},
}
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))")
_MONEY = r"\\\$|[€£¥￥₹]|\\(?:euro|pounds|yen)(?![A-Za-z])"
_FONTS = (
    r"\\(?:text(?:superscript|bf|it|rm|sf|tt|normal|sl|sc|up|md)?|math(?:rm|bf|it|sf|tt|up|normal|bb|cal)|operatorname\*?|mbox|hbox|emph|bm"
    r"|boldsymbol|pmb|underline|symbf|symbfup|symup)"
)
_WRAPPED = re.compile(_FONTS + r"\s*\{([^{}]*)\}")
_NESTED = re.compile(_FONTS + r"\s*(?=\{[^{}]*\{)")
_SWITCHED = re.compile(
    r"\{\s*\\(?:rm|bf|it|sf|tt|cal|bfseries|itshape|displaystyle|textstyle)(?![A-Za-z])\s*([^{}]*)\}"
)
_DROPPED = re.compile(
    r"\\(?:left|right)(?![A-Za-z])\.?|\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|phantom\{[^{}]*\}"
    r"|rm|bf|it|nonumber|notag|hfill|noindent|protect|boldmath|mathopen|mathclose|mathord)(?![A-Za-z])"
)
_SPACES = re.compile(
    r"(?<!\\)\\[,;:>! ]|\\(?:thinspace|medspace|thickspace|negthinspace|enspace|quad|qquad|space)(?![A-Za-z])|~"
)
_HSPACE = re.compile(r"\\(?:text)?color\{[^{}]*\}|\\[hm]space\*?\{[^{}]*\}|\\[mh]skip[\d.]+\w\w")
# between the threes of a long number: a thin space in any spelling, a comma in braces, an apostrophe
_GAP = r"(?:\\(?:text|mathord|mathpunct|mathrm)\s*\{,\}|\\kern\s*[\d.]+\s*[a-z]{2}\s|\{,\}|\{\\[,;:!]\}|,\s*\\!|\\(?:[,;:!> ]|thinspace|medspace)|~|'|\s)+\s*"
_THREES = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)")
_DECIMALS = re.compile(rf"(?<=\.)\d{{3}}(?:{_GAP}\d{{3}})*(?:{_GAP}\d{{1,3}})(?!\d)")
_GAPS = re.compile(_GAP)
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_BOX = re.compile(r"\\(?:f|d|frame)?box(?:ed)?\s*\{")
_END_MARKS = re.compile(r"(?:[\s.,;:?]|\\\\|\\[,;:! ]|~|\\text\{[\s.,;:?]*\}|\{[\s.,;:?]*\}|\\checkmark|✓|\\)+$")
_START_MARKS = re.compile(
    r"(?i)^(?:[\s:=;,]|\\approx|\\simeq|\\doteq|\\cong|\\sim|\\text\{\s*(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?)?\s*[:=]?\s*\}|\\therefore|&)+"
)
_I = re.compile(r"\\(?:imath|jmath|mathrm i|text i|sqrt\s*\{?\s*-\s*1\s*\}?)(?![A-Za-z])")
_PRODUCT_I = re.compile(r"(?:\\cdot|\\times|\*)\s*i\b")
_ELLIPSIS = re.compile(r"(?:\.\.\.|…|\\[lcd]?dots)\s*$")


def plain(latex: str) -> str:
    """The answer in one spelling; the empty string where there is none.

    Digits, signs and brackets of any script become ASCII or LaTeX; fonts become ``\\text`` or go; thousands lose their gaps;
    sentence marks, ``=`` and ``\\approx`` at the ends go, as do boxes within the box; every spelling of i is ``i``.
    """
    text = _ascii(latex)
    text = re.sub(_MONEY, lambda match: {"\\$": r"\dollar "}.get(match[0], r"\money "), text)
    text = text.replace("$", "").replace("**", "").replace("`", "")
    text = re.sub(
        r"(?<!\\)\\[()\[\]]|\\begin\{(?:equation|align|gather)\*?\}|\\end\{(?:equation|align|gather)\*?\}", "", text
    )
    text = _unboxed(text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = _HSPACE.sub(" ", _DROPPED.sub("", text))
    text = _THREES.sub(_closed, text)
    text = _DECIMALS.sub(_closed, text)
    text = _DECIMAL_COMMA.sub(".", text)
    text = _words(text)
    text = re.sub(r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}\s*\}", r"\\text{\1/\2}", text)
    text = re.sub(r"\\text\{([^{}]*)\}\s*(?:\\cdot|\\times|/)\s*\\text\{([^{}]*)\}", r"\\text{\1/\2}", text)
    text = re.sub(r"\^\s*\{?\s*\\text\s*\{\s*o\s*\}\s*\}?", r"^\\circ ", _bare_braces(text))
    text = _SPACES.sub(" ", text.replace(r"\!", ""))
    text = re.sub(r"\\leq?(?:slant)?(?![A-Za-z])", r"\\le", re.sub(r"\\geq?(?:slant)?(?![A-Za-z])", r"\\ge", text))
    text = re.sub(r"\\(?:lt|gt)(?![A-Za-z])", lambda match: "<" if match[0] == "\\lt" else ">", text)
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").replace(r"\varnothing", r"\emptyset")
    text = re.sub(
        r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree))|\\(?:degree|textdegree)(?![A-Za-z])",
        r"^\\circ ",
        text,
    )
    text = _PRODUCT_I.sub("i", _I.sub("i", text))
    return _trimmed(re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text))


def ends_in_dots(latex: str) -> bool:
    """Whether a number goes on without an end: ``0.333...``."""
    return bool(_ELLIPSIS.search(latex))


def plain_signs(text: str) -> str:
    """A text with digits, letters, signs and spaces of full width as ASCII."""
    return "".join(unicodedata.normalize("NFKC", char) if "！" <= char <= "～" else char for char in text)


def _ascii(text: str) -> str:
    made = []
    for char in _raised(text):
        digit = unicodedata.decimal(char, None)
        if char in _SIGNS:
            made.append(_SIGNS[char])
        elif digit is not None:
            made.append(str(digit))
        elif "！" <= char <= "～" or 0x1D400 <= ord(char) <= 0x1D7FF:  # full width, and mathematical letters
            made.append(_SIGNS.get(char, unicodedata.normalize("NFKC", char)))
        elif unicodedata.decomposition(char).startswith("<fraction>"):
            above, below = unicodedata.normalize("NFKC", char).split("\u2044")
            made.append(rf"\frac{{{above}}}{{{below}}}")
        elif unicodedata.category(char) == "Zs":
            made.append(" ")
        else:
            made.append(char)
    return _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3]}}}", "".join(made))


def _raised(text: str) -> str:
    """Superscript and subscript characters in runs, as LaTeX."""
    for mark, sign in (("<super>", "^"), ("<sub>", "_")):
        chars = "".join(sorted({c for c in text if unicodedata.decomposition(c).startswith(mark) and c not in _SIGNS}))
        if chars:
            run = re.compile(f"[{re.escape(chars)}]+")
            text = run.sub(partial(_in_braces, sign), text)
    return text


def _bare_braces(text: str) -> str:
    """Without empty braces, and with single ones for double."""
    return re.sub(r"(?<!\\)\{\{([^{}]*)\}\}", r"{\1}", re.sub(r"(?<!\\)\{\s*\}", "", text))


def _in_braces(sign: str, match: re.Match) -> str:
    return f"{sign}{{{unicodedata.normalize('NFKC', match[0])}}}"


def _closed(match: re.Match) -> str:
    return _GAPS.sub("", match[0])


def _unboxed(text: str) -> str:
    r"""``x = \boxed{5}`` is ``x = 5``: the braces stay, and mean nothing."""
    return _BOX.sub("{", text) if "box" in text else text


def _words(text: str) -> str:
    r"""Every font command with words in it as ``\text{...}``; with a number, a letter or a sign in it, that alone."""
    for _ in range(4):  # fonts within fonts
        before = text
        text = _WRAPPED.sub(_word, _SWITCHED.sub(r"\\text{\1}", text))
        if text == before:
            break
    return _NESTED.sub("", text)


def _word(match: re.Match) -> str:
    command, inner = match[0].partition("{")[0].strip(), match[1]
    bare = inner.strip()
    if command in (r"\mathbb", r"\mathcal"):
        return match[0] if bare != "i" else "i"
    if not re.search(r"[^\W\d_]", bare):  # numbers and signs; a space apart from what stands before
        return f" {bare} " if bare else " "
    if bare in ("i", "e", "j"):
        return bare
    is_text = command.startswith((r"\text", r"\mbox", r"\hbox", r"\emph", r"\underline"))
    if re.search(r"[=<>+]", bare) or (
        not is_text and re.search(r"\d", bare) and not re.search(r"[A-Za-z]{2}|\^", bare)
    ):
        return bare
    if len(bare) == 1 and not is_text and command not in (r"\mathrm", r"\operatorname"):
        return bare
    if "\\" in bare and not is_text:
        return bare
    return rf"\text{{{inner}}}"


def _trimmed(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    for _ in range(4):
        before = text
        if not ends_in_dots(text):
            text = _END_MARKS.sub("", text)
        text = _START_MARKS.sub("", text)
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


def closing(text: str, start: int) -> int:
    r"""The index of the bracket that closes the one at ``start``, of ``( [ {``, whatever kind closes it; -1 without one."""
    depth, position = 0, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 2
            continue
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position
        position += 1
    return -1
