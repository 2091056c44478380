"""One writer at a time: a lock on a folder or a file, which the system takes back when its holder ends, however it ends.

The folder itself is locked (``flock``): there is no lock file to go stale or to be tidied up. Where the system or the
file system has no such locks, no one is kept out, and unique temporary names are what is left of the protection.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What flock says of a file system without it; EBADF is NFS, which locks only what is open for writing.
UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def try_lock(descriptor: int) -> bool:
    """Whether an open file or folder is this one's alone from here on; True where locks do not exist."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder, if it is not there, and keep other writers out of it. One made here and still empty goes again.

    Threads of one process keep each other out as well. The lock stays with the folder when it is renamed.

    Raises:
        BlockingIOError: another writer holds it.
        NotADirectoryError: it is a file.
    """
    descriptor, created = _open_locked(folder)
    try:
        yield
    finally:
        if created and _is_same(folder, descriptor):
            with contextlib.suppress(OSError):  # it holds something: what was to be written
                folder.rmdir()
        if descriptor is not None:
            # for children that were forked meanwhile and hold the descriptor too
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _open_locked(folder: Path) -> tuple[int | None, bool]:
    created = False
    while True:
        try:
            folder.mkdir(parents=True)
            created = True
        except FileExistsError:
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"{folder}: found a file, wanted a folder to write into") from None
        if fcntl is None:
            return None, created
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # whoever made it had no use for it
            continue
        if not try_lock(descriptor):
            os.close(descriptor)
            raise BlockingIOError(
                f"{folder}: found another save or conversion that writes into it, wanted one at a time: "
                "wait for that one, or write to another folder"
            )
        if _is_same(folder, descriptor):
            return descriptor, created
        os.close(descriptor)  # removed or renamed between the two calls


def _is_same(folder: Path, descriptor: int | None) -> bool:
    try:
        return descriptor is None or os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
