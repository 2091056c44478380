"""The rows of a training file, each with its place in it: JSON lines, a JSON array, Parquet, or text by lines.

JSON is read by Python, not by Arrow: a table has one type a column, so that rows whose tool calls take other arguments would get each
other's, as nulls.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_rows(file: str | Path) -> Iterator[tuple[str, Row]]:
    """``("line 3", {...})`` or ``("row 3", {...})``, counted from one; blank lines are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a suffix of another kind, a row that is no JSON object, text that is not UTF-8, a damaged Parquet file.
    """
    file = Path(file)
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".txt": _text_lines}
    read = readers.get(file.suffix.lower())
    if read is None:
        raise ValueError(f"{file}: found {file.suffix or 'no suffix'}, wanted one of {', '.join(readers)}")
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise FileNotFoundError(f"{file}: found {found}, wanted rows to train on")
    return read(file)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with something in them, without line end and byte-order mark."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith(UTF16):
                raise ValueError(f"{file}: found UTF-16, wanted UTF-8")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: line {number}: found byte 0x{line[error.start]:02x} after {error.start} others, wanted UTF-8"
                ) from None
            if text.strip():
                yield number, text.rstrip("\r\n")


def _json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    for number, text in _lines(file):
        if number == 1 and text.lstrip().startswith("["):  # an array, whatever the suffix says
            yield from _json(file)
            return
        place = f"line {number}"
        yield place, _row(_parse(text, f"{file}: {place}", "a JSON object"), f"{file}: {place}")


def _json(file: Path) -> Iterator[tuple[str, Row]]:
    texts = [text for _, text in _lines(file)]
    if not texts:
        return
    if not texts[0].lstrip().startswith("["):
        first = f"{file}: line 1"
        try:
            json.loads(texts[0])
        except ValueError:  # not a line by itself: one object over many
            yield "row 1", _row(_parse("\n".join(texts), str(file), "a JSON array, or an object a line"), first)
            return
        yield from _json_lines(file)
        return
    rows = _parse("\n".join(texts), str(file), "a JSON array of objects")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _row(row, f"{file}: row {number}")


def _parse(text: str, place: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: found no JSON ({error}), wanted {wanted}") from None


def _row(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: found {kind(row)}, wanted an object with named columns")
    return row


def _text_lines(file: Path) -> Iterator[tuple[str, Row]]:
    for number, text in _lines(file):
        yield f"line {number}", {"text": text}


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", {name: _without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: found no Parquet file, or a damaged one ({error})") from None


def _without_nulls(value: Any) -> Any:
    """A table's structs have every field that one of its rows has; those that are null here were never written."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None or name == "content"}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for of, name in names.items() if isinstance(value, of)), f"a {type(value).__name__}")
