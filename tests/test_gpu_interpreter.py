"""The Triton kernels against their references, on a CPU: in Triton's interpreter, repaired, in processes of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(Path(__file__).parent.glob("gpu/cases_*.py"))
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_kernels_match_their_references(cases):
    """Whether a kernel is interpreted is read as it is decorated: so another process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=cases.parents[2], env=environment, text=True, capture_output=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
