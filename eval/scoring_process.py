"""Scoring in a process of its own, which can be ended: an answer such as ``9^{9^{9^9}}`` may take for ever, and an alarm signal
reaches neither a thread nor a long division.

Started as a file this module is that process: it reads calls, one a line, and writes what they return.
"""

import atexit
import importlib
import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import psutil

SECONDS = 10.0  # of computing, for one call
PATIENCE = 20  # times as long by the clock, on a busy machine
MEMORY = 4 << 30  # bytes of address space
WATCH = 0.1  # seconds between two looks
PACKAGE = "modeling_deepseek_moe"
_log = logging.getLogger(__name__)


def math_answer(text: str) -> str | None:
    """`math.scoring.math_answer`; None too where it takes too long.

    Raises:
        ImportError: math-verify is missing.
    """
    return _process(os.getpid()).call("math_answer", text)


def is_equal(gold: str, answer: str) -> bool:
    """`math.scoring.is_equal`; False too where it takes too long.

    Raises:
        ImportError: math-verify is missing.
    """
    return bool(_process(os.getpid()).call("is_equal", gold, answer))


class ScoringProcess:
    """One process that scores, started when it is first needed and again after it had to be ended. Threads take turns.

    Args:
        seconds: of computing that a call may take.
    """

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self._lock = seconds, threading.Lock()
        self._running: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as this
        atexit.register(self.close)

    def call(self, function: str, *arguments: str):
        """What ``math.scoring.function`` returns, or None: it took too long, or the process died of it twice.

        Raises:
            ImportError: math-verify is missing. RuntimeError: the process does not start.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('found no math-verify, wanted it to score MATH: pip install "math-verify"')
        line = json.dumps([function, *arguments]).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # what ended it may have come from outside
                if self._running is None or self._running.poll() is not None:
                    self._start()
                try:
                    self._running.stdin.write(line)
                    self._running.stdin.flush()
                except BrokenPipeError:
                    self._end()
                    continue
                if not self._answers():
                    _log.warning(
                        "scoring took over %g seconds and counts as no match: %.200r", self.seconds, arguments
                    )
                    self._end()
                    return None
                if reply := self._running.stdout.readline():
                    return json.loads(reply)
                self._end()
            _log.warning("scoring failed and counts as no match: %.200r: %s", arguments, self._last_words())
            return None

    def close(self) -> None:
        self._end()
        self._errors.close()
        atexit.unregister(self.close)

    def _start(self) -> None:
        file = Path(__file__).resolve()
        command = [
            sys.executable,
            "-P",
            str(file),
            str(file.parent),
        ]  # -P: modules next to it have the library's names
        self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        if not self._running.stdout.readline():  # it has imported what it needs: that counts for no call
            self._end()
            raise RuntimeError(f"the process that scores answers does not start: {self._last_words()}")

    def _answers(self) -> bool:
        """Wait for an answer, or the end of the process; False when the call has had its time."""
        worker, start = psutil.Process(self._running.pid), time.monotonic()
        before = _computed(worker)
        while not select.select([self._running.stdout], [], [], WATCH)[0]:
            long = time.monotonic() - start > PATIENCE * self.seconds
            if long or _computed(worker) - before > self.seconds:
                return False
        return True

    def _last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 300))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "killed"

    def _end(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None


@cache
def _process(owner: int) -> ScoringProcess:
    """Of this process: a fork has its own."""
    return ScoringProcess()


def _computed(worker: psutil.Process) -> float:
    try:
        times = worker.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _serve(folder: str) -> None:
    """Answer calls until the input ends, with the modules of ``eval`` alone: the package loads torch, which takes seconds."""
    for name, path in ((PACKAGE, []), (f"{PACKAGE}.eval", [folder])):
        module = ModuleType(name)
        module.__path__ = path
        sys.modules[name] = module
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if importlib.util.find_spec("resource"):
        import resource

        hardest = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hardest == resource.RLIM_INFINITY or hardest > MEMORY:  # else there is a closer limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hardest))
    scoring = importlib.import_module(f"{PACKAGE}.eval.math.scoring")
    scoring.is_equal("1", "1")  # imports math-verify
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        print(json.dumps(getattr(scoring, function)(*arguments)), file=replies, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
