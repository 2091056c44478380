"""Memory and processor time as control groups allow them: v1, v2 and both, nested, in a container and out of one."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from releases import SHAPES, write_release

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import cgroups, machine
from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.eval.model import DeepseekLM

GB = 1 << 30
JOB = "/system.slice/slurmstepd.scope/job_7"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def memory_v2(folder: str, limit: object, used: int, cached: int = 0, high: object = "max") -> dict[str, str]:
    stat = f"anon 1\ninactive_file {cached}"
    named = {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}
    return {f"{folder}/{name}": str(value) for name, value in named.items()}


def memory_v1(folder: str, limit: int, used: int, cached: int = 0, above: int = 1 << 62) -> dict[str, str]:
    stat = f"inactive_file 0\nhierarchical_memory_limit {above}\ntotal_inactive_file {cached}"
    named = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{folder}/{name}": str(value) for name, value in named.items()}


NO_LIMIT_V1 = 0x7FFFFFFFFFFFF000
MEMORY = {
    "no files": ("0::/", {}, (None, None)),
    "v2, the group itself": (f"0::{JOB}", memory_v2(JOB, 8 * GB, GB), (8 * GB, 7 * GB)),
    "v2, a group above": (
        f"0::{JOB}/step_0/user",
        memory_v2(f"{JOB}/step_0/user", "max", GB) | memory_v2(JOB, 8 * GB, 3 * GB),
        (8 * GB, 5 * GB),
    ),
    "v2, the smallest of several, and the least left": (
        "0::/a/b",
        memory_v2("/a/b", 16 * GB, GB) | memory_v2("/a", 20 * GB, 12 * GB),
        (16 * GB, 8 * GB),
    ),
    "v2, a container that sees its group as the root": (f"0::{JOB}", memory_v2("", 4 * GB, GB), (4 * GB, 3 * GB)),
    "v2, throttled": ("0::/a", memory_v2("/a", 8 * GB, GB, high=6 * GB), (6 * GB, 5 * GB)),
    "v2, cached pages are not used": ("0::/a", memory_v2("/a", 8 * GB, 6 * GB, 5 * GB), (8 * GB, 7 * GB)),
    "v2, more used than allowed": ("0::/a", memory_v2("/a", GB, 2 * GB), (GB, 0)),
    "v2, a path above its namespace": ("0::/../..", memory_v2("", 4 * GB, GB), (4 * GB, 3 * GB)),
    "v1": (
        f"9:memory:{JOB}\n3:cpu,cpuacct:/",
        memory_v1(f"memory{JOB}", 8 * GB, 2 * GB, GB) | memory_v1("memory", NO_LIMIT_V1, 99 * GB),
        (8 * GB, 7 * GB),
    ),
    "v1, a container's path is the host's": (
        "9:memory:/docker/0123",
        memory_v1("memory", 8 * GB, 2 * GB),
        (8 * GB, 6 * GB),
    ),
    "v1, a limit above the container": (
        "9:memory:/",
        memory_v1("memory", NO_LIMIT_V1, GB, above=3 * GB),
        (3 * GB, None),
    ),
    "both": (
        f"9:memory:{JOB}\n0::/user.slice",
        memory_v1(f"memory{JOB}", 8 * GB, GB) | memory_v2("unified/user.slice", 6 * GB, GB),
        (6 * GB, 5 * GB),
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name, tmp_path):
    groups, files, wanted = MEMORY[name]
    process = tree(tmp_path, {"cgroup": groups}) / "cgroup"
    assert cgroups.memory(tree(tmp_path / "fs", files), process) == wanted


@pytest.mark.parametrize(
    ("groups", "files", "wanted", "threads"),
    [
        ("0::/", {}, None, 64),
        ("0::/a/b", {"/a/b/cpu.max": "max 100000", "/a/cpu.max": "250000 100000"}, 2.5, 2),
        ("0::/a/b", {"/a/b/cpu.max": "50000 100000", "/a/cpu.max": "250000 100000"}, 0.5, 1),
        ("0::/a", {"/a/cpu.max": "max"}, None, 64),
        ("0::/a", {"/a/cpu.max": "99900000 100000"}, 999.0, 64),
        (
            "4:cpu,cpuacct:/job",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            4.0,
            4,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 64),
        ("not a line\n::::", {"/cpu.max": "two words"}, None, 64),
    ],
)
def test_processors(groups, files, wanted, threads, tmp_path):
    process = tree(tmp_path, {"cgroup": groups}) / "cgroup"
    root = tree(tmp_path / "fs", files)
    assert cgroups.cpus(root, process) == wanted
    assert cgroups.threads(64, root, process) == threads


def test_without_control_groups(tmp_path):
    assert cgroups.memory(tmp_path / "none", tmp_path / "none") == (None, None)
    assert cgroups.cpus(tmp_path / "none", tmp_path / "none") is None


@pytest.fixture
def container(tmp_path, monkeypatch) -> Path:
    """A host of 512 GB and a container of 7 GB and one and a half processors."""
    host = psutil.virtual_memory()._replace(total=512 * GB, available=500 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    root = tree(tmp_path / "fs", memory_v2("", 8 * GB, GB) | {"cpu.max": "150000 100000"})
    monkeypatch.setattr(machine, "CGROUP", root)
    return root


def test_the_machine_is_the_container(container):
    found = machine.probe_machine(measure=False)
    assert (found.ram_bytes, found.ram_available, found.threads) == (8 * GB, 7 * GB, 1)


def test_rows_of_an_evaluation_fit_the_container(container):
    config = dsm.DeepseekV3Config()
    evaluated = SimpleNamespace(device=torch.device("cpu"), model=SimpleNamespace(config=config, dtype=torch.bfloat16))
    rows = DeepseekLM._rows_that_fit(evaluated, 32768)
    assert rows >= 1 and rows * parameter_breakdown(config).cache_bytes(32768, 2) < 7 * GB


def test_a_container_that_is_too_small_for_the_experts_is_told(tmp_path, monkeypatch, caplog):
    write_release(tmp_path / "v3", SHAPES["v3"](), fp8=True)
    tight = tree(tmp_path / "fs", memory_v2("", 1 << 20, (1 << 20) - 4096))
    monkeypatch.setattr(machine, "CGROUP", tight)
    with caplog.at_level("WARNING"):
        dsm.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "v3")
    assert "0.0 GB of memory are available" in caplog.text
