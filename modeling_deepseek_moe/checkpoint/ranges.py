"""A range of bytes of a file, read into memory in full."""

import io

from modeling_deepseek_moe.checkpoint.headers import CheckpointError


def read_range(stream: io.FileIO, start: int, memory: memoryview, what: str) -> None:
    """Fill ``memory`` with the bytes of a file from ``start`` on; one read may stop short (2 GiB at most, a signal).

    Args:
        what: file and tensor, as an error is to name them.

    Raises:
        CheckpointError: the file ends before.
    """
    stream.seek(start)
    done = 0
    while done < len(memory):
        count = stream.readinto(memory[done:])
        if not count:
            raise CheckpointError(
                f"{what}: found the file's end at {start + done}, wanted {start + len(memory)} bytes"
            )
        done += count
