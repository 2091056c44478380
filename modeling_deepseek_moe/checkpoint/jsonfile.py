"""Reading the JSON files of a folder, config.json and the like: an object, or an error that says what lies there."""

import json
from pathlib import Path

from modeling_deepseek_moe.checkpoint.headers import LFS_POINTER, CheckpointError, check_is_regular, refuse_pointer

MAX_BYTES = 100_000_000  # ten times the index of DeepSeek-V3


def read_json(file: Path, wanted: str = "a JSON object") -> dict:
    """The object in a file, unknown fields included.

    Args:
        wanted: what the file is there for, as an error is to say it.

    Raises:
        CheckpointError: no such file, no regular file, too large a one, not JSON, or JSON that is no object.
    """
    try:
        status = file.stat()
        check_is_regular(file, status)
        if status.st_size > MAX_BYTES:
            raise CheckpointError(f"{file}: found {status.st_size} bytes, wanted {wanted} of at most {MAX_BYTES}")
        data = file.read_bytes()
        refuse_pointer(file, data[: len(LFS_POINTER)])
        value = json.loads(data.decode())  # UTF-8 without a mark before it, as whoever reads it after us wants it
    except OSError as error:
        found = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"a file that cannot be read ({error.strerror})"
        )
        raise CheckpointError(f"{file}: found {found}, wanted {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: found a file that is not JSON ({error}), wanted {wanted}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: found a {type(value).__name__}, wanted a JSON object: {wanted}")
    return value
