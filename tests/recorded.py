"""Recorded answers and figures of others, which are not in this repository: where they are missing, the summary says so."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
MISSING = "not checked without"


def recorded(name: str) -> Path:
    """The file, or the test is skipped and named in the summary of the run (`conftest.pytest_terminal_summary`)."""
    if not (FOLDER / name).is_file():
        pytest.skip(f"{MISSING} {name}, which is not part of this repository")
    return FOLDER / name
