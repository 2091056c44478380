"""Whether drafting pays: measured while the text is written, on an account that only what was saved, or a small share, may be spent of."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator

from modeling_deepseek_moe.decoding.expected import Expected

PLAIN_STEPS = 4  # measured first; the very first is left out, which finds everything cold
DRAFTED_STEPS = 5  # measured before it is decided
CLEARLY = 1.2  # what one step shows may be disturbed, and what bytes say too little
ALLOWED = 0.025  # of the time so far may be lost to trying
MOST_SAVED = 8.0  # plain steps that drafting may lose again, of those that it saved
RECENT = 16  # steps


class Choice:
    """How many tokens to draft in each step.

    Automatically: an account holds time. Each step pays in a small share of its own; one that drafts takes out what it took
    longer than the tokens that it made would have by plain steps, or pays in what it saved. Steps draft as long as the account
    holds what the next one would lose if no draft of it stood, so that a text takes at no time much longer than a plain
    one. The first step of a run of them reads what was said meanwhile besides, and says nothing of the others. After a few of
    these it is decided whether they go on; earlier where no acceptance of the steps to come could make up
    for those measured; and again where they stop paying later on.
    """

    def __init__(self, drafts: int, expected: Expected | None = None):
        """
        Args:
            expected: of such steps, reckoned; ``None``: not automatically, but always.
        """
        self.drafts, self.is_automatic, self._expected = drafts, expected is not None, expected
        self.pays: bool | None = None
        self._account = 0.0
        self._plain: deque[float] = deque(maxlen=RECENT)
        self._drafted: deque[float] = deque(maxlen=RECENT)
        self._caught_up: deque[float] = deque(maxlen=RECENT)  # the first steps of runs
        self._tokens, self._is_cold, self._is_behind = 0.0, True, True

    @contextlib.contextmanager
    def step(self, most: int, stats) -> Iterator[int]:
        """Yields the tokens to draft, ``most`` at most, and measures what happens meanwhile."""
        if not self.is_automatic or self.pays is False or not most:
            yield 0 if self.pays is False else most
            return
        count = most if self._can_lose(self._risk()) else 0
        before, rows, start = stats.tokens, stats.row_steps, time.perf_counter()
        yield count
        seconds, active = time.perf_counter() - start, stats.row_steps - rows
        if not active:
            return
        self._account += ALLOWED * seconds
        if count:
            self._enter(seconds, (stats.tokens - before) / active, most + 1)
        elif self._is_cold:
            self._is_cold = False
        else:
            self._plain.append(seconds)
        self._is_behind = not count

    @property
    def _token(self) -> float:
        return statistics.median(self._plain)

    def _risk(self) -> float | None:
        """What the next drafted step loses if none of its drafts stands; ``None`` until plain steps are measured.

        After a run that ended with its first step, that of two: the second is measured.
        """
        if len(self._plain) < PLAIN_STEPS - 1:
            return None
        assert self._expected is not None
        lost = self._beyond_plain(self._drafted, self._expected.cost)
        if self._is_behind:
            reads = self._beyond_plain(self._caught_up, self._expected.first)
            return reads + lost if self._caught_up else reads
        return lost

    def _beyond_plain(self, measured: deque[float], expected: float) -> float:
        token = self._token
        return (statistics.median(measured) if measured else CLEARLY * expected * token) - token

    def _can_lose(self, seconds: float | None) -> bool:
        if seconds is None:
            return False
        if self._account >= seconds:
            return True
        if self.pays:  # no more: it is measured again
            self.pays, self._tokens = None, 0.0
            self._plain.clear()
            self._drafted.clear()
        return False

    def _enter(self, seconds: float, tokens: float, most: int) -> None:
        """A drafted step."""
        token = self._token
        self._account = min(self._account + tokens * token - seconds, MOST_SAVED * token)
        if self._is_behind:
            self._caught_up.append(seconds)
            return
        self._drafted.append(seconds)
        if self.pays:
            return
        self._tokens += tokens
        if len(self._drafted) >= DRAFTED_STEPS:
            self.pays = self._tokens * token > sum(self._drafted)
        elif self._is_lost(most, token):
            self.pays = False

    def _is_lost(self, tokens: int, token: float) -> bool:
        """Whether drafting would lose even if each step to come gave all its ``tokens`` in the time of the fastest so far."""
        left = DRAFTED_STEPS - len(self._drafted)
        fastest = min(self._drafted)
        clearly = CLEARLY if len(self._drafted) == 1 else 1
        return sum(self._drafted) + left * fastest > (self._tokens + left * tokens) * token * clearly
