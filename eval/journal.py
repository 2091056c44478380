"""What a run has answered so far, one line an answer, so that an interrupted run goes on where it was."""

import fcntl
import hashlib
import json
import os
from pathlib import Path

from modeling_deepseek_moe.eval.results import to_json

JOURNAL_FILE = "journal.jsonl"


def request_key(kind: str, arguments: object, repeat: int) -> str:
    """Names the ``repeat``-th request with these arguments, in any process."""
    text = json.dumps([kind, arguments, repeat], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """An append-only file of answers. Its first line says what run it is of: another run's answers are never taken.

    Args:
        file: created where it is missing; a torn last line, as a killed run leaves it, is cut off.
        run: what determines the answers: model, settings, seeds.

    Raises:
        ValueError: the file is of another run, or a line in its middle is damaged.
        BlockingIOError: another process writes to it.
    """

    def __init__(self, file: Path, run: dict):
        self.file, self.answers = Path(file), {}
        run = json.loads(json.dumps(run))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._out = self.file.open("a+b")
        try:
            self._lock()
            complete = self._read(run)
        except (ValueError, OSError):
            self._out.close()
            raise
        self._out.truncate(complete)
        if not complete:
            self._write([{"run": run}])

    def _lock(self) -> None:
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{self.file}: another process writes to it; wait, or give another --out") from None

    def _read(self, run: dict) -> int:
        """Fill ``answers``; the bytes of whole lines."""
        complete = 0
        for number, line in enumerate(self.file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry["run"], run)
                else:
                    self.answers[entry["key"]] = entry["answer"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.file}:{number}: damaged ({error}); remove it to begin anew") from None
            complete += len(line)
        return complete

    def _check(self, found: dict, wanted: dict) -> None:
        names = sorted(found.keys() | wanted.keys())
        if other := [name for name in names if found.get(name) != wanted.get(name)]:
            name = other[0]
            raise ValueError(
                f"{self.file}: found answers of another run, with {name} {found.get(name)!r}, wanted {wanted.get(name)!r}: "
                "give another --out, or remove the folder to begin anew"
            )

    def add(self, answers: dict[str, object]) -> None:
        """Keep answers by key; on the disk when this returns."""
        self._write([{"key": key, "answer": answer} for key, answer in answers.items()])
        self.answers |= answers

    def _write(self, entries: list[dict]) -> None:
        self._out.write("".join(to_json(entry) + "\n" for entry in entries).encode())
        self._out.flush()
        os.fsync(self._out.fileno())

    def close(self) -> None:
        self._out.close()
