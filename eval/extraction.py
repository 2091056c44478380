"""The answer in a model's text. Every function is linear in the text's length.

The three stages for MMLU-Pro are those of the benchmark's authors (``evaluate_from_api.py`` of TIGER-AI-Lab/MMLU-Pro). Their
patterns begin with ``.*`` or end in a negative lookahead over the rest of the text, which costs quadratic time on texts that
do not match; here the last match is found by walking over all matches.
"""

import re

_STATED = re.compile(r"answer is \(?([A-J])\)?")
# a lookahead, since one match may begin on the letter that ends the match before it: "answer: Answer: B"
_LABELLED = re.compile(r"(?=[aA]nswer:\s*([A-J]))")
# greedy, and tried at the text's beginning only: it walks back from the end once
_LAST_LETTER = re.compile(r".*\b([A-J])\b", re.DOTALL)
_SIMPLE_EVALS = re.compile(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?")
_BOX_TOKENS = re.compile(
    r"\\{1,4}(?:boxed|fbox)\s*(?:(?P<box>\{)|(?!\\+(?:boxed|fbox))(?P<bare>[^\s$.,{}][^\s$.,]*))|\\."
    r"|(?P<open>\{+)|(?P<close>\}+)",
    re.DOTALL,
)
# between boxes that are one answer in parts: marks, "and", "or", and the name of a variable
_BETWEEN = re.compile(
    r"(?:\n\s*\d{1,2}[.)]|[\s$,;&*:\-–、，；]|\\[,;:! ()\[\]]|\\\\|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or|also|as well as|und|oder|et|ou|y|o)\b|[和或与及]"
    r"|(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?\s*=)*"
)
_ANSWER_LINE = re.compile(
    r"(?im)(?:(?:^|[.!?。][ \t])[ \t#>*_]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t]*\**[ \t]*[:：]|\bfinal[ \t]+answer[ \t]+is[ \t:]*"
    r"|^[ \t#>*_]*(?:the[ \t]+)?final[ \t]+answer[ \t*_]*\n|答案[ \t]*[是为]?[ \t]*[:：])\**\s*(\S.*)"
)
_FINAL = re.compile(r"(?i)final answer is(.*)")
_BOXES = ("\\boxed", "\\fbox")
THINK_END = "</think>"


def stock_mmlu_pro_letter(text: str) -> str | None:
    """What lm-eval's own mmlu_pro task extracts: stage one of the authors' chain and nothing else."""
    match = _STATED.search(text)
    return match[1] if match else None


def mmlu_pro_letter(text: str) -> str | None:
    """The letter A to J that the MMLU-Pro authors' chain extracts, or None.

    First "answer is (X)"; else, on the first line that has one, the last "answer: X"; else the last letter that stands alone.
    Bold marks are removed first, as the authors do.
    """
    text = text.replace("**", "")
    if stated := stock_mmlu_pro_letter(text):
        return stated
    return _labelled_letter(text) or _last_letter(text)


def _labelled_letter(text: str) -> str | None:
    found, line_end = None, len(text)
    for match in _LABELLED.finditer(text):
        if match.start() > line_end:
            break
        if found is None:
            newline = text.find("\n", match.start())
            line_end = newline if newline >= 0 else len(text)
        found = match[1]
    return found


def _last_letter(text: str) -> str | None:
    match = _LAST_LETTER.match(text)
    return match[1] if match else None


def stated_letters(text: str) -> list[str]:
    """Every letter that the first stage would read, in order."""
    return [match[1] for match in _STATED.finditer(text)]


def labelled_letters(text: str) -> list[str]:
    """Every letter that the second stage would read, in order."""
    return [match[1] for match in _LABELLED.finditer(text)]


def last_letter_span(text: str) -> tuple[int, int] | None:
    """Where the letter stands that the third stage reads."""
    match = _LAST_LETTER.match(text)
    return match.span(1) if match else None


def simple_evals_letter(text: str) -> str | None:
    """The letter A to D of the first "Answer: X", as simple-evals reads GPQA answers, or None."""
    match = _SIMPLE_EVALS.search(text)
    return match[1].upper() if match else None


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` that closes, braces matched; None without one.

    ``\boxed 5`` gives ``5``. A box that never closes, as where the output was cut off, is no answer; one before it is.
    """
    found = box_spans(text)
    return found[-1][2] if found else None


def boxes(text: str) -> list[str]:
    """The contents of the last box and of those before it that only `_BETWEEN` divides from it: one answer in parts."""
    found = box_spans(text)
    if not found:
        return []
    first = len(found) - 1
    while first and _is_between(text, found[first - 1][1], found[first][0]):
        first -= 1
    return [content for _, _, content in found[first:]]


def _is_between(text: str, start: int, end: int) -> bool:
    return end - start < 100 and bool(_BETWEEN.fullmatch(text, start, end))


def box_spans(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each box that closes, in order; a box within a box is part of its content."""
    found: list[tuple[int, int, str]] = []
    stack: list[
        tuple[int, int]
    ] = []  # of open braces: where their box begins, -1 for none, and where its content does
    for match in _BOX_TOKENS.finditer(text):
        if match["box"]:
            stack.append((match.start(), match.end()))
        elif match["bare"]:
            found.append((match.start(), match.end(), match["bare"]))
        elif match["open"]:
            stack += [(-1, 0)] * len(match["open"])
        elif match["close"] and stack:
            for i in range(min(len(match["close"]), len(stack))):
                start, content = stack.pop()
                if start >= 0:
                    while found and found[-1][0] > start:  # it was within this one
                        found.pop()
                    found.append((start, match.start() + i + 1, text[content : match.start() + i].strip()))
    return found


def labelled_answer(text: str) -> str | None:
    """What follows the last "Answer:", "Final answer is" or heading of that name; None where a box was begun."""
    if any(box in text for box in _BOXES):
        return None
    found = None
    for found in _ANSWER_LINE.finditer(text):  # noqa: B007 the last one
        pass
    return found[1].strip().strip("*").strip() or None if found else None


def after_thinking(text: str) -> str:
    """What follows the last ``</think>``; empty when thinking never ended, as then nothing was answered."""
    _, mark, answer = text.rpartition(THINK_END)
    return answer.lstrip() if mark else ""


def minerva_answer(text: str) -> str | None:
    r"""What a base model gives after Minerva's examples: "The final answer is $X$. I hope it is correct."; else the last box."""
    stated = _FINAL.search(text)
    if not stated:
        return boxed(text)
    line = stated[1].partition("I hope it is correct")[0]
    return line.strip().removesuffix(".").strip().strip("$").strip() or boxed(text)
