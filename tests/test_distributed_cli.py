"""``deepseek-moe train`` under torchrun, ``accelerate launch`` and as tasks of srun, as they are."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from distributed_runs import free_port

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.distributed.checkpoints import newest_whole

pytestmark = pytest.mark.slow

TORCHRUN = "-m", "torch.distributed.run", "--nproc-per-node", "2"
# which starts several processes on accelerators, and on CPUs where there is an mpirun
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"text": f"Ada has {number} pens and buys {number} more."} for number in range(2, 34)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(dsm.tiny_checkpoint(), folder / "tiny")
    (folder / "deepseek-moe").write_text("from modeling_deepseek_moe.cli import main\n\nmain()\n")
    return folder


def launch(folder, launcher, out, *flags):
    command = [sys.executable, *launcher]
    command += ["--master-port" if launcher is TORCHRUN else "--main_process_port", str(free_port())]
    command += training(out, *(("--ddp_backend", "gloo") if launcher is TORCHRUN else ()), *flags)
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=280, check=False)


def training(out, *flags):
    command = ["deepseek-moe", "train", "--model", "tiny", "--train_file", "rows.jsonl", "--output_dir", out]
    command += ["--max_length", "64", "--per_device_train_batch_size", "2", "--report_to", "none", "--use_cpu"]
    return [*command, "--disable_tqdm", "true", *flags]


def losses(folder, out):
    state = json.loads((folder / out / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def test_both_launchers_train_alike(folder):
    """One process by one, DDP and FSDP2 by the other: the same losses, and each one folder that loads."""
    flags = "--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1"
    whole = "--per_device_train_batch_size", "4"
    for launcher, out, more in (
        (ACCELERATE, "one", whole),
        (TORCHRUN, "ddp", ()),
        (TORCHRUN, "fsdp", ("--fsdp_size", "2")),
    ):
        run = launch(folder, launcher, out, *flags, *more)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count(f"wrote {out} (FP8 release)") == 1
    for out in ("ddp", "fsdp"):
        assert losses(folder, out) == pytest.approx(losses(folder, "one"), rel=1e-5)
    one, ddp, fsdp, tiny = (dsm.CheckpointReader.open(folder / out) for out in ("one", "ddp", "fsdp", "tiny"))
    assert one.nbytes == ddp.nbytes == tiny.nbytes  # in parts the dtypes of what is no code are those of the training
    assert set(one) == set(ddp) == set(fsdp) == set(tiny)


def test_tasks_of_srun_are_ranks(folder):
    """Two processes with what srun sets for its tasks: one run, not two."""
    command = [sys.executable, *training("srun", "--max_steps", "1", "--save_strategy", "no", "--ddp_backend", "gloo")]
    step = {
        **{"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
        **{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
        **{"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    }
    tasks = []
    for number in ("0", "1"):
        own = os.environ | step | {"SLURM_PROCID": number, "SLURM_LOCALID": number}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        tasks.append(subprocess.Popen(command, cwd=folder, env=own, text=True, **pipes))
    ends = [task.communicate(timeout=280) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], ends
    assert sum(printed.count("wrote srun (FP8 release)") for printed, _ in ends) == 1


def test_a_run_in_parts_goes_on(folder):
    saving = "--fsdp_size", "2", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "1"
    run = launch(folder, TORCHRUN, "parts", "--max_steps", "1", *saving)
    assert run.returncode == 0, run.stderr[-3000:]
    assert newest_whole(folder / "parts") == folder / "parts" / "checkpoint-1"
    run = launch(folder, TORCHRUN, "parts", "--max_steps", "2", *saving, "--resume_from_checkpoint", "true")
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(losses(folder, "parts")) == [1, 2]


@pytest.mark.long
def test_sharding_that_would_be_none_is_refused(folder):
    run = launch(folder, TORCHRUN, "none", "--max_steps", "1", "--fsdp")
    assert run.returncode != 0
    assert run.stderr.count("fsdp: found a CPU, where accelerate shards nothing") == 2
