"""The text that the tiny checkpoint learns from: word problems with worked solutions, ten-option multiple choice.

Every problem is drawn from the numbers of `random.Random(seed).random`, which are the same in every Python. A problem is
held out, or not, by a checksum of its question: no held-out question is ever trained on.
"""

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

NAMES = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo")
GOODS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
LETTERS = "ABCDEFGHIJ"
HELD_OUT_PART = 10  # one question in this number
LARGEST = 99  # no number is larger

# As evaluation asks: MATH's request for a boxed answer, MMLU-Pro's zero-shot prompt.
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
MMLU_PRO = (
    "The following are multiple choice questions (with answers) about ",
    '. Think step by step and then output the answer in the format of "The answer is (X)" at the end.\n\nQuestion: ',
    "\nOptions: ",
    "Answer: Let's think step by step.",
)


class Problem(NamedTuple):
    """``family`` is one of `FAMILIES`; ``answer`` a number, or the letter of the right option; ``prompt`` what is asked.

    ``category`` and ``options`` are multiple choice's; ``question`` is the question alone, without options or request.
    """

    family: str
    question: str
    solution: str
    answer: str
    prompt: str
    category: str = ""
    options: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation, for the chat template."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.solution}]

    @property
    def is_held_out(self) -> bool:
        """In whichever form it is asked."""
        return zlib.crc32("\n".join((self.question, *self.options)).encode()) % HELD_OUT_PART == 0


class _Draw:
    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def pick(self, options):
        return options[self.between(0, len(options) - 1)]

    def shuffled(self, options: list) -> list:
        options = list(options)
        for last in range(len(options) - 1, 0, -1):
            other = self.between(0, last)
            options[last], options[other] = options[other], options[last]
        return options


class _Worked(NamedTuple):
    """A question with the steps to its answer, before anything says how the answer is to be given."""

    question: str
    steps: str
    answer: int


def _sum(draw: _Draw) -> _Worked:
    name, goods, a, b = draw.pick(NAMES), draw.pick(GOODS), draw.between(1, 20), draw.between(1, 20)
    question = f"{name} has {a} {goods} and buys {b} more. How many {goods} does {name} have now?"
    return _Worked(question, f"{a} + {b} = {a + b}", a + b)


def _difference(draw: _Draw) -> _Worked:
    name, goods, a, b = draw.pick(NAMES), draw.pick(GOODS), draw.between(1, 20), draw.between(1, 20)
    question = f"{name} had {a + b} {goods} and gave away {b} of them. How many {goods} are left?"
    return _Worked(question, f"{a + b} - {b} = {a}", a)


def _product(draw: _Draw) -> _Worked:
    name, goods, a, b = draw.pick(NAMES), draw.pick(GOODS), draw.between(2, 9), draw.between(2, 9)
    question = f"{name} fills {a} boxes with {b} {goods} each. How many {goods} is that in all?"
    return _Worked(question, f"{a} * {b} = {a * b}", a * b)


def _two_steps(draw: _Draw) -> _Worked:
    name, goods = draw.pick(NAMES), draw.pick(GOODS)
    a, b, c = draw.between(2, 9), draw.between(2, 9), draw.between(1, 9)
    question = (
        f"{name} fills {a} boxes with {b} {goods} each and has {c} {goods} besides. How many {goods} is that in all?"
    )
    return _Worked(question, f"{a} * {b} = {a * b}. {a * b} + {c} = {a * b + c}", a * b + c)


def _equation(draw: _Draw) -> _Worked:
    x, a = draw.between(1, 20), draw.between(1, 20)
    if draw.random() < 0.5:
        return _Worked(f"Solve x + {a} = {x + a} for x.", f"x = {x + a} - {a} = {x}", x)
    return _Worked(f"Solve x - {a} = {x} for x.", f"x = {x} + {a} = {x + a}", x + a)


def _arithmetic(draw: _Draw) -> _Worked:
    a, b = draw.between(1, 20), draw.between(1, 20)
    if draw.random() < 0.5:
        return _Worked(f"What is {a} + {b}?", f"{a} + {b} = {a + b}", a + b)
    return _Worked(f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}", a)


def _way(draw: _Draw) -> _Worked:
    a, b = draw.between(2, 9), draw.between(2, 9)
    return _Worked(f"A cart moves at {a} m/s for {b} s. How many metres does it go?", f"{a} * {b} = {a * b}", a * b)


WORD_PROBLEMS = {  # the easiest first
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "two steps": _two_steps,
    "equation": _equation,
}
CATEGORIES = {
    "math": (_arithmetic, _arithmetic, _equation),
    "business": (_sum, _difference, _product),
    "physics": (_way,),
}
FAMILIES = (*WORD_PROBLEMS, "choice")
_WEIGHTS = (*WORD_PROBLEMS, "choice", "choice", "choice", "choice")


def _word_problem(draw: _Draw, family: str) -> Problem:
    question, steps, answer = WORD_PROBLEMS[family](draw)
    prompt = question + (BOXED if draw.random() < 0.5 else "")
    return Problem(family, question, f"{steps}. The answer is \\boxed{{{answer}}}.", str(answer), prompt)


def _listed(options: list[int]) -> str:
    return "\n".join(f"{letter}. {value}" for letter, value in zip(LETTERS, options, strict=False))


def _choice(draw: _Draw) -> Problem:
    """The options are the answers of ten questions alike, so that none stands out; the solution reads them up to its own."""
    category = draw.pick(list(CATEGORIES))
    question, steps, answer = draw.pick(CATEGORIES[category])(draw)
    options = [answer]
    while len(options) < len(LETTERS):
        other = draw.pick(CATEGORIES[category])(draw).answer
        if other not in options:
            options.append(other)
    options = draw.shuffled(options)
    place = options.index(answer)
    if draw.random() < 0.5:
        head, then, listing, end = MMLU_PRO
        prompt = f"{head}{category}{then}{question}{listing}{_listed(options)}\n{end}"
    else:
        prompt = f"{question}\n{_listed(options)}"
    solution = f"{steps}\n{_listed(options[: place + 1])}. The answer is ({LETTERS[place]})."
    return Problem("choice", question, solution, LETTERS[place], prompt, category, tuple(map(str, options)))


def problems(seed: int, *, held_out: bool = False, family: str | None = None) -> Iterator[Problem]:
    """Problems without end, the same for the same arguments; those trained on, or those held out.

    Raises:
        ValueError: no such family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    draw = _Draw(seed)
    while True:
        name = family or draw.pick(_WEIGHTS)
        problem = _choice(draw) if name == "choice" else _word_problem(draw, name)
        if problem.is_held_out == held_out:
            yield problem
