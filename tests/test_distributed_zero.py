"""DeepSpeed's ZeRO on two processes, called as itself: accelerate starts its ranks on accelerators only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_runs import free_port

pytestmark = pytest.mark.long
RANK = Path(__file__).with_name("zero_rank.py")


def losses(stage: int) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *(launcher if stage else ()), str(RANK), str(stage)]
    own = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=own, capture_output=True, text=True, timeout=560, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("losses "))
    return json.loads(line.removeprefix("losses "))


@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_states_and_parameters_train_alike(stage):
    """ZeRO-3 takes parameters apart and gathers those of a module as it is called: none is read elsewhere."""
    pytest.importorskip("deepspeed")
    assert losses(stage) == pytest.approx(losses(0), rel=1e-5)
