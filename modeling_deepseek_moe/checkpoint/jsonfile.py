"""Reading the JSON files of a folder, config.json and the like: an object, or an error that says what lies there."""

import json
from pathlib import Path

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, check_is_regular


def read_json(file: Path, wanted: str = "a JSON object") -> dict:
    """The object in a file, unknown fields included.

    Args:
        wanted: what the file is there for, as an error is to say it.

    Raises:
        CheckpointError: no such file, no regular file, not JSON, or JSON that is no object.
    """
    try:
        check_is_regular(file, file.stat())
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: found no such file, wanted {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: found a file that is not JSON ({error}), wanted {wanted}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: found a {type(value).__name__}, wanted a JSON object: {wanted}")
    return value
