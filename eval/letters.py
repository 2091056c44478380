"""Other readings of a letter than the benchmark's own, which stand next to it: how much a score owes to its reading.

- ``published``: MMLU-Pro as its published figures were read: the authors' first pattern, and a letter by chance where it finds
  none. ``extraction.mmlu_pro_letter`` is the authors' later chain, which finds more.
- ``last``: the last letter that is stated, as the authors' newer script takes; the chain takes the first.
- ``lenient``: a letter in any ordinary spelling: ``Answer: **B**``, ``\\boxed{B}``, ``答案 B``.

`marks` names what to look at: answers that state several letters, and letters that may be the words "I" and "A".
"""

import random
import re
from dataclasses import dataclass

from modeling_deepseek_moe.eval import extraction
from modeling_deepseek_moe.eval.math.spelling import plain_signs
from modeling_deepseek_moe.eval.rows import LETTERS


@dataclass(frozen=True)
class Reading:
    """``title`` for a table, ``about`` for a sentence after it."""

    title: str
    about: str


READINGS = {
    "published": Reading(
        "As published", "the authors' first pattern, “answer is (X)”, and a letter by chance where it finds none"
    ),
    "last": Reading(
        "Last letter", "the last letter stated, where an answer states several; the score takes the first"
    ),
    "lenient": Reading("Lenient", "any ordinary spelling of a letter: Answer: **B**, \\boxed{B}, (B), 答案：B"),
}
MARKS = {
    "several": "Several letters stated",
    "word": "Letter may be the word I or A",
    "chance": "No stated letter: drawn by chance as published",
}
# after "A" and "I" as letters of options stand these; after the article and the pronoun, other words
_VERBS = r"(?:is|because|since|as|and|or|but|with|which|for|in|by|from|to|if|seems|remains|fits|matches|holds)\b"
_WORD = re.compile(
    rf"(?:A[ \t\n]+(?!{_VERBS})[a-z]|I(?:['’](?:m|d|ll|ve|s)\b|[ \t\n]+(?!(?:is|because|since|and|or)\b)[a-z]))"
)
_OPENING = r"[\s(\[{}<\"'“‘*_`$:=\\\-–—]{0,12}"
_CLOSED = r"(?![A-Za-z0-9]|['’][a-z])"
_LABEL = (
    r"(?:answer|ans|choice|答案|正确选项|正解|答え|ответ|respuesta|réponse|antwort|risposta)(?:\s{0,3}(?:is|was|would be|should be|must be"
    r"|are|=|:|是|为|應為|应为|应该是|应选|选|選|は|es|est|ist)){0,3}\s{0,3}(?:also|therefore|thus|simply|clearly)?\s{0,3}"
    r"(?:(?:the\s)?(?:option|choice|letter|选项))?"
)
_TIERS = (
    re.compile(rf"(?i:{_LABEL}){_OPENING}(?P<letter>[A-J]|(?<=\()[a-j](?=\))|[a-j](?=[\s*]*(?:[.)\n]|$))){_CLOSED}"),
    re.compile(
        rf"(?i:option|choice|choose|pick|select|go with|选择|選擇|选|選)(?:\s(?:is|was))?{_OPENING}(?P<letter>[A-J]|(?<=\()[a-j](?=\))){_CLOSED}"
    ),
    re.compile(
        r"\b(?P<letter>[A-J])\)?\s(?:is|must be|should be|seems)\s(?:the\s)?(?i:correct|right|best|answer|true)"
        r"|(?i:\b(?:is|hence|so|thus|therefore)|[:=→]),?\s{0,3}\(?(?P<last>[A-J])\W{0,6}\Z"
    ),
    re.compile(r"\((?P<letter>[A-J])\)"),
    re.compile(r"(?m)^[\s\W]{0,8}(?P<letter>[A-J])(?:[\s\W]{0,8}$|[.)]\s)"),
)
_BOXED = re.compile(r"\s*(?:option\s)?\(?\s*([A-Ja-j])\s*(?:$|[).:,]|\s*\))")
_DRESS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|boldsymbol|bm|underline|operatorname)\s*(?=\{)|\\LETTER|</?(?:answer|b|strong|final)>|\*\*|__"
)


def last_letter(text: str) -> str | None:
    """The chain's letter, but the last where the text states several by one pattern."""
    found = _stated(text)
    return found[-1] if found else extraction.mmlu_pro_letter(text)


def published_letter(question: dict, text: str) -> str:
    """The first pattern's letter, or one of the question's by chance: the same for the same question and text."""
    letters = LETTERS[: len(question.get("options", LETTERS))]
    drawn = random.Random(f"{question.get('id', '')}\n{text}").choice(letters)
    return extraction.stock_mmlu_pro_letter(text.replace("**", "")) or drawn


def lenient_letter(text: str, letters: str = LETTERS) -> str | None:
    """The letter that the text gives as its answer, in any ordinary spelling; None without one.

    The last "answer is X" or box; else the last "option X"; else "X is correct"; else the last "(X)"; else the last line that is
    a letter.
    """
    bare = _DRESS.sub("", plain_signs(text))
    places = [(match.start(), match["letter"]) for match in _TIERS[0].finditer(bare) if not _is_word(bare, match)]
    for start, _, content in extraction.box_spans(bare):
        if found := _BOXED.match(content.strip("{} $")):
            places.append((start, found[1]))
    stated = [letter for _, letter in sorted(places) if letter.upper() in letters]
    for tier in _TIERS[1:]:
        if not stated:
            found_here = (next(filter(None, match.groups())) for match in tier.finditer(bare))
            stated = [letter for letter in found_here if letter.upper() in letters]
    return stated[-1].upper() if stated else None


def marks(question: dict, text: str) -> tuple[str, ...]:
    """Keys of `MARKS` that hold for an answer to MMLU-Pro."""
    found, stated = [], _stated(text)
    if len(set(stated)) > 1:
        found.append("several")
    text = text.replace("**", "")
    if not stated and (span := extraction.last_letter_span(text)) and _WORD.match(text, span[0]):
        found.append("word")
    if extraction.stock_mmlu_pro_letter(text) is None:
        found.append("chance")
    return tuple(found)


def _stated(text: str) -> list[str]:
    """All letters that the first pattern of the chain with a match finds, of the two that ask for a statement."""
    text = text.replace("**", "")
    return extraction.stated_letters(text) or extraction.labelled_letters(text)


def _is_word(text: str, match: re.Match) -> bool:
    return bool(_WORD.match(text, match.start("letter")))
