"""What srun says of a task, read as torch's ranks. The variables are those of Slurm 22.05."""

import pytest

from modeling_deepseek_moe.cli import _slurm

TASK = {
    **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7"},
    **{"SLURM_STEP_NODELIST": "rack-n[003-005,9]", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "1"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
}


def test_a_task_is_a_rank():
    found = _slurm.ranks(TASK)
    port = found.pop("MASTER_PORT")
    assert found == {
        **{"RANK": "3", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "rack-n003"},
    }
    last = _slurm.ranks(TASK | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"})
    assert last["LOCAL_WORLD_SIZE"] == "1" and last["MASTER_PORT"] == port
    assert 20_000 <= int(port) < 30_000
    assert _slurm.ranks(TASK | {"SLURM_STEP_ID": "3"})["MASTER_PORT"] != port  # two steps of a job at a time
    # what srun itself works with is a number above 2^31 for steps that are no tasks of one's own
    assert 20_000 <= int(_slurm.ranks(TASK | {"SLURM_STEP_ID": "4294967291"})["MASTER_PORT"]) < 30_000


def test_what_is_set_stays():
    assert _slurm.ranks(TASK | {"RANK": "0"}) == {}  # srun torchrun
    found = _slurm.ranks(TASK | {"MASTER_ADDR": "other", "MASTER_PORT": "29500"})
    assert "MASTER_ADDR" not in found and "MASTER_PORT" not in found and found["RANK"] == "3"


def test_outside_of_a_step_of_several_nothing_is_said():
    assert _slurm.ranks({}) == {}
    # an sbatch script, which is one process, whatever it has been given
    assert _slurm.ranks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == {}
    assert _slurm.ranks(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_a_step_without_its_variables_is_an_error_that_names_them():
    """As containers have it that hand on some of them only."""
    known = {name: value for name, value in TASK.items() if name not in ("SLURM_LOCALID", "SLURM_NODEID")}
    with pytest.raises(
        ValueError, match=r"NUM_TASKS=7: found no SLURM_LOCALID, SLURM_NODEID, wanted .*RANK and WORLD_SIZE"
    ):
        _slurm.ranks(known)
    assert _slurm.ranks(known | {"RANK": "0"}) == {}


@pytest.mark.parametrize(
    "nodes, host",
    [
        *[
            ("a7", "a7"),
            ("a7,b1", "a7"),
            ("n[01-04]", "n01"),
            ("n[7,9-11],m1", "n7"),
            ("r2-n[008-011,020]", "r2-n008"),
        ],
        *[("r[2-3]-n[008-011]", "r2-n008"), ("n[1-2].cluster,m", "n1.cluster")],
    ],
)
def test_the_first_host(nodes, host):
    assert _slurm.first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "n[", "n[]", "n[1-2"])
def test_names_that_cannot_be_read(nodes):
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST: found"):
        _slurm.first_host(nodes)


def test_tasks_on_each_node():
    assert [_slurm.tasks_of("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    assert _slurm.tasks_of("8", 0) == 8
    for counts, node in (("2(x3),1", 4), ("two", 0), ("", 0)):
        with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE: found"):
            _slurm.tasks_of(counts, node)
