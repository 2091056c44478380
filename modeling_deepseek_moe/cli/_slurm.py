"""Tasks of Slurm's srun as ranks: torch reads what torchrun sets, and srun says the same under names of its own."""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 20_000, 10_000  # below those that systems hand out by themselves
STEP = (  # what srun sets for each task of a step
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"),
)


def ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set for a task of srun: rank and size, on the node and in whole, and where rank 0 listens.

    Nothing for a step of one task, outside of srun (an sbatch script names tasks that it has not started), and where a
    launcher that srun started has set ``RANK``. A ``MASTER_ADDR`` or ``MASTER_PORT`` that is there already stays.

    Raises:
        ValueError: srun's list of nodes, or of tasks on each, cannot be read; a variable of the step's is not there.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "RANK" in environment:
        return {}
    missing = [name for name in STEP if name not in environment]
    if missing:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={environment['SLURM_STEP_NUM_TASKS']}: found no {', '.join(missing)}, wanted what srun sets "
            "for a task: start the tasks by srun with its variables handed on, or set RANK and WORLD_SIZE as torchrun does; "
            "for one process unset SLURM_STEP_NUM_TASKS"
        )
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_of(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (7 * job + step) % PORTS),  # the same on all, another for each step
    }
    return {name: value for name, value in found.items() if not (name.startswith("MASTER") and name in environment)}


def first_host(nodes: str) -> str:
    """``"a7"`` of ``"a7"`` and ``"a7,b1"``; ``"rack2-n008"`` of ``"rack2-n[008-011,020]"`` and of ``"rack[2-3]-n[008-011]"``."""
    # up to the first comma outside of brackets, and of each pair of brackets what stands first
    first = re.fullmatch(r"((?:[^,\[\]]|\[\w[^\[\]]*\])+)(?:,.*)?", nodes.strip())
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST: found {nodes!r}, wanted names of nodes, such as node[01-04]")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[1])


def tasks_of(counts: str, node: int) -> int:
    """Tasks on a node by ``SLURM_STEP_TASKS_PER_NODE``: 2 on nodes 0 to 2 and 1 on node 3 of ``"2(x3),1"``."""
    passed = 0
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            break
        passed += int(match[2] or 1)
        if node < passed:
            return int(match[1])
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: found {counts!r}, wanted tasks on node {node}, such as 2(x3),1")
