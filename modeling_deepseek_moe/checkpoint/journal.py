"""What a run has finished so far, one line a piece, so that an interrupted run goes on where it was.

``{"run": …}`` says what run it is of; ``{"key": …, "answer": …}`` is a finished piece.
"""

import json
import os
from pathlib import Path
from typing import Any

from modeling_deepseek_moe.checkpoint.lock import try_lock


def to_json(value: object, **options) -> str:
    """As people read it, one line without ``options`` of json; half a surrogate pair, which UTF-8 cannot hold, makes it ASCII."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


class Journal:
    """An append-only file of finished pieces. Those of another run are never taken.

    Args:
        file: created where it is missing; a torn last line, as a killed run leaves it, is cut off.
        run: what determines the pieces: inputs, settings, seeds.
        pieces, way_out: how an error calls the pieces, and what it says can be done.

    Raises:
        ValueError: the file is of another run, or a line in its middle is damaged.
        BlockingIOError: another process writes to it.
    """

    def __init__(
        self,
        file: Path,
        run: dict,
        pieces: str = "answers",
        way_out: str = "give another --out, or remove the folder to begin again",
    ):
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        run = json.loads(json.dumps(run))
        self._out = self.file.open("a+b")
        try:
            if not try_lock(self._out.fileno()):
                raise BlockingIOError(f"{self.file}: another process writes to it; wait, or write elsewhere")
            self.answers, complete = read_journal(self.file, run, pieces, way_out)
        except (ValueError, OSError):
            self._out.close()
            raise
        self._out.truncate(complete)
        if not complete:
            self._write([{"run": run}])

    def add(self, answers: dict[str, Any]) -> None:
        """Keep pieces by key; on the disk when this returns."""
        self._write([{"key": key, "answer": answer} for key, answer in answers.items()])
        self.answers |= answers

    def _write(self, entries: list[dict]) -> None:
        self._out.write("".join(to_json(entry) + "\n" for entry in entries).encode())
        self._out.flush()
        os.fsync(self._out.fileno())

    def close(self) -> None:
        self._out.close()


def read_journal(file: Path, run: dict, pieces: str, way_out: str) -> tuple[dict[str, Any], int]:
    """The pieces in a file by key, and the bytes of its whole lines. Errors as `Journal`'s."""
    answers: dict[str, Any] = {}
    complete = 0
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            if number == 1:
                _check(file, entry["run"], run, pieces, way_out)
            else:
                answers[entry["key"]] = entry["answer"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}:{number}: damaged ({error}); remove it to begin again") from None
        complete += len(line)
    return answers, complete


def _check(file: Path, found: dict, wanted: dict, pieces: str, way_out: str) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{file}: found {pieces} of another run, with {name} {found.get(name)!r}, wanted "
                f"{wanted.get(name)!r}: {way_out}"
            )
