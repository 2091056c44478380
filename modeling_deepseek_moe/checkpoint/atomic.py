"""Files that appear whole or not at all: written under a temporary name of their own, flushed, renamed.

Temporary names are unique, so two writers of one file never write into each other's; the last rename wins. What a
killed process leaves is told by its name, and removed by the next writer of the folder that holds its lock.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(?:tmp|old)")


def temporary_path(path: Path, kind: str = "tmp") -> Path:
    """A hidden name next to ``path`` that no one else has; ``old`` is for what makes room for a new file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{kind}")


@contextlib.contextmanager
def flushed(path: Path, name: str, size: int) -> Iterator[BinaryIO]:
    """A file that is on the disk once it is closed. Errors call it ``name``, its final name."""
    try:
        with path.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{path.parent / name}: {error.strerror} while writing {size} bytes") from error


def write_file(path: Path, content: str | bytes) -> None:
    """The whole file, on the disk when this returns; interrupted, what was there before. Makes its folder."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with flushed(temporary, path.name, len(data)) as stream:
            stream.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def copy_flushed(source: Path, path: Path) -> None:
    """A copy under a name that no one looks for yet, on the disk when this returns."""
    with source.open("rb") as data, flushed(path, path.name, source.stat().st_size) as stream:
        shutil.copyfileobj(data, stream)


def flush_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a rename outlasts a power cut only then."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush files only
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Remove what killed writers left in a folder, of files whose final names ``is_wanted``."""
    for path in folder.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and is_wanted(match[1]):
            path.unlink(missing_ok=True)
