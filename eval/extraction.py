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
# what backslashes escape and pairs with no brace inside are passed over in runs
_BRACES = re.compile(r"(?:\\.|\{[^{}\\]*\})+|(\{+)|(\}+)", re.DOTALL)
_SPACE, _BARE = re.compile(r"\s*"), re.compile(r"[^\s$.,]*")
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


def simple_evals_letter(text: str) -> str | None:
    """The letter A to D of the first "Answer: X", as simple-evals reads GPQA answers, or None."""
    match = _SIMPLE_EVALS.search(text)
    return match[1].upper() if match else None


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}``, braces matched; None without one.

    ``\boxed 5`` gives ``5``. A box that never closes, as where the output was cut off, is no answer: None.
    """
    start = max(text.rfind(box) for box in _BOXES)
    if start < 0:
        return None
    rest = _SPACE.match(text, text.index("box", start) + 3 + 2 * text.startswith("\\boxed", start)).end()
    if rest == len(text):
        return None
    if text[rest] != "{":
        return _BARE.match(text, rest)[0] or None
    depth = 1
    for match in _BRACES.finditer(text, rest + 1):  # runs of braces, or of what backslashes escape
        count = match.end() - match.start()
        if match[1]:
            depth += count
        elif match[2]:
            if count >= depth:
                return text[rest + 1 : match.start() + depth - 1].strip()
            depth -= count
    return None


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
