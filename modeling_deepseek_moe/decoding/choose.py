"""Whether drafting pays: measured on the first tokens, and reckoned before from the bytes that a step reads."""

import contextlib
import time
from collections.abc import Iterator

PLAIN_STEPS = 4  # measured first; the very first is left out, which finds everything cold
DRAFTED_STEPS = 6
CLEARLY = 1.2  # one step alone may be disturbed


class Choice:
    """How many tokens to draft in each step.

    Automatically: a few plain steps and a few drafted ones are timed, and drafting goes on where it gave more tokens per second. It
    ends earlier where no acceptance of the steps to come could make up for those measured.
    """

    def __init__(self, drafts: int, is_automatic: bool):
        self.drafts, self.is_automatic = drafts, is_automatic
        self._plain: list[float] = []
        self._drafted: list[float] = []
        self._tokens, self._steps = 0.0, 0
        self.pays: bool | None = None

    @contextlib.contextmanager
    def step(self, most: int, stats) -> Iterator[int]:
        """Yields the tokens to draft, ``most`` at most, and measures what happens meanwhile."""
        if not self.is_automatic or not most:
            yield most
            return
        plain = self.pays is False or (self.pays is None and len(self._plain) < PLAIN_STEPS)
        before, rows, start = stats.tokens, stats.row_steps, time.perf_counter()
        yield 0 if plain else most
        if self.pays is not None:
            return
        seconds, active = time.perf_counter() - start, stats.row_steps - rows
        if not active:
            return
        if plain:
            self._plain.append(seconds)
            return
        self._steps += 1
        if self._steps == 1:  # reads what was said before, too
            return
        self._drafted.append(seconds)
        self._tokens += (stats.tokens - before) / active
        token = min(self._plain[1:])
        if self._steps == DRAFTED_STEPS:
            self.pays = self._tokens * token > sum(self._drafted)
        elif self._is_lost(most + 1, token):
            self.pays = False

    def _is_lost(self, tokens: int, token: float) -> bool:
        """Whether drafting would lose even if each step to come gave all its ``tokens`` in the time of the fastest so far."""
        left = DRAFTED_STEPS - self._steps
        fastest = min(self._drafted)
        clearly = CLEARLY if len(self._drafted) == 1 else 1
        return sum(self._drafted) + left * fastest > (self._tokens + left * tokens) * token * clearly
