"""Training on 1, 2 and 4 processes: the same counts, biases and losses; resuming at another size; ranks that differ or die."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache

import distributed_runs
import pytest
import torch
from distributed_runs import free_port, on_ranks
from releases import SHAPES, write_release
from safetensors.torch import load_file
from test_int4_release import write_int4

from modeling_deepseek_moe import CheckpointReader
from modeling_deepseek_moe.distributed.checkpoints import newest_whole

pytestmark = pytest.mark.slow

# fp32: sums are divided among ranks in another order, and Adam makes steps of signs at first
TOLERANCE = 1e-5
# name → what an adapter is trained on, and how the ranks divide it
ADAPTERS = {
    **{f"ddp-{base}": (base, {}) for base in ("plain", "fp8", "int4", "nf4")},
    **{f"fsdp-{base}": (base, {"parts": {"fsdp_size": 2}}) for base in ("plain", "fp8", "int4")},
}
SOON = ("ddp-fp8", "fsdp-fp8")  # on ranks that CI starts anyway; the others are long


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, SHAPES["v3-mtp"]())
    return folder


@pytest.fixture(scope="module")
def one(release, tmp_path_factory):
    return distributed_runs.train(tmp_path_factory.mktemp("one"), release)


@pytest.fixture(scope="module")
def two(release, adapter_runs, tmp_path_factory):
    """Two ranks; the first run is stopped after two steps of six."""
    folder, parts = tmp_path_factory.mktemp("two"), {"fsdp_size": 2}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    cases = {
        "fsdp": {"parts": parts} | saving,
        "checkpointing": {"parts": parts, "gradient_checkpointing": True, "max_steps": 3},
        "experts": {"parts": parts | {"ep_size": 2}},
    }
    runs = [(name, "train", settings | {"release": str(release)}) for name, settings in cases.items()]
    return folder, on_ranks(folder, 2, *runs, *(adapter_runs[name] for name in SOON))


@pytest.fixture(scope="module")
def four(release, two, tmp_path_factory):
    """Four ranks, of which one run goes on from the two ranks' second step."""
    folder = tmp_path_factory.mktemp("four")
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    resumed = {"parts": {"fsdp_size": 4}, "resume": str(two[0] / "fsdp" / "checkpoint-2")} | saving
    cases = {
        "resumed": resumed,
        "experts": {"parts": {"fsdp_size": 4, "ep_size": 2}},
        "replicas": {"parts": {"fsdp_size": 2, "dp_replicate_size": 2}, "max_steps": 3},
    }
    runs = [(name, "train", settings | {"release": str(release)}) for name, settings in cases.items()]
    return folder, on_ranks(folder, 4, *runs)


def assert_like(found: dict, one: dict, first: int = 0):
    steps = len(found["logs"])
    assert steps and found["biases"] == one["biases"][first : first + steps]
    assert found["loads"][-steps:] == one["loads"][first : first + steps]
    for log, wanted in zip(found["logs"], one["logs"][first : first + steps], strict=True):
        for name in {"loss", "lm_loss", "mtp_loss", "balance_loss"} & wanted.keys():
            assert log[name] == pytest.approx(wanted[name], rel=TOLERANCE), (log["epoch"], name)
        for name in ("max_vio", "load_entropy", "dead_experts", "bias_min", "bias_max"):
            assert log[name] == pytest.approx(wanted[name], rel=1e-6), name


@pytest.mark.parametrize("run", ["fsdp", "checkpointing", "experts"])
def test_two_ranks_train_as_one(one, two, run):
    for rank, found in enumerate(two[1][run]):
        assert found["kinds"] == ["DTensor"]
        assert found["biases"] == two[1][run][0]["biases"], rank
    assert_like(two[1][run][0], one)


@pytest.mark.long
@pytest.mark.parametrize("run, first", [("experts", 0), ("replicas", 0), ("resumed", 2)])
def test_four_ranks_train_as_one(one, four, run, first):
    """Also from the two ranks' checkpoint: weights, moments and biases are divided again."""
    assert {found["kinds"][0] for found in four[1][run]} == {"DTensor"}
    assert_like(four[1][run][0], one, first)


@pytest.mark.long
def test_one_process_goes_on_from_four(release, one, four, tmp_path):
    settings = {"resume": str(four[0] / "resumed" / "checkpoint-4"), "save_only_model": True}
    assert_like(distributed_runs.train(tmp_path, release, **settings), one, 4)


def test_checkpoints_are_releases(two, release):
    wanted, found = CheckpointReader.open(release), CheckpointReader.open(two[0] / "fsdp" / "checkpoint-6")
    assert found.keys() == wanted.keys() and len(found.files) == 2
    assert not torch.equal(found.tensor("lm_head.weight"), wanted.tensor("lm_head.weight"))


def test_a_checkpoint_without_states_is_named(release, two, tmp_path):
    shutil.copytree(two[0] / "fsdp" / "checkpoint-2", tmp_path / "checkpoint-2")
    lost = next((tmp_path / "checkpoint-2" / "sharded_states").glob("__1*"))
    lost.unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-2: cannot go on with the optimizer: .*found no {lost.name}"):
        settings = {"resume": str(tmp_path / "checkpoint-2"), "save_only_model": True}
        distributed_runs.train(tmp_path, release, **settings)


@pytest.mark.long
@pytest.mark.parametrize("fp8", [True, False])
def test_fp8_training_on_two_ranks(release, tmp_path, fp8):
    """One step: weights that it leaves a bit apart may get other codes in the next, which are 6 % apart."""
    settings = {"fp8": fp8, "release": str(release), "max_steps": 1}
    (tmp_path / "one").mkdir()
    alone = distributed_runs.train(tmp_path / "one", **settings)
    found = on_ranks(tmp_path, 2, ("fp8", "train", settings | {"parts": {"fsdp_size": 2}}))["fp8"]
    assert_like(found[0], alone)
    assert_same_tensors(tmp_path / "fp8" / "gradients.safetensors", tmp_path / "one" / "gradients.safetensors")


def assert_same_tensors(found, wanted):
    ours, theirs = load_file(found), load_file(wanted)
    assert ours.keys() == theirs.keys() and theirs
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=TOLERANCE, atol=TOLERANCE * tensor.abs().max().item())


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """What adapters are trained on: the folder, and settings of `train` by name. SGD, whose steps are as near as gradients are."""
    folder = tmp_path_factory.mktemp("adapters")
    for base in ("plain", "fp8"):
        write_release(folder / base, SHAPES["v3"](), fp8=base == "fp8")
    write_int4(folder / "int4", SHAPES["kimi"](), linears=True)
    stored = {"plain": "plain", "fp8": "fp8", "int4": "int4", "nf4": "plain"}
    common = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    return folder, {base: common | {"lora": base, "release": str(folder / place)} for base, place in stored.items()}


@pytest.fixture(scope="module")
def adapter_runs(bases):
    """As `on_ranks` takes them, by name."""
    return {name: (name, "train", bases[1][base] | more) for name, (base, more) in ADAPTERS.items()}


@pytest.fixture(scope="module")
def two_adapted(adapter_runs, tmp_path_factory):
    """Two ranks, with the adapters that are long."""
    folder = tmp_path_factory.mktemp("adapted")
    return folder, on_ranks(folder, 2, *(run for name, run in adapter_runs.items() if name not in SOON), timeout=600)


@pytest.fixture(scope="module")
def adapted_alone(bases):
    """On one process, by base."""

    @cache
    def of(base: str):
        place = bases[0] / f"alone-{base}"
        place.mkdir()
        return place, distributed_runs.train(place, **bases[1][base])

    return of


@pytest.mark.parametrize("name", [n if n in SOON else pytest.param(n, marks=pytest.mark.long) for n in ADAPTERS])
def test_adapters_on_two_ranks(request, adapted_alone, name):
    """Losses, gradients of the first step, and the adapter that is saved."""
    place, alone = adapted_alone(ADAPTERS[name][0])
    folder, found = request.getfixturevalue("two" if name in SOON else "two_adapted")
    assert_like(found[name][0], alone)
    for file in ("gradients.safetensors", "adapter/adapter_model.safetensors"):
        assert_same_tensors(folder / name / file, place / file)


def test_a_killed_rank_ends_the_others(release, tmp_path):
    """By torchrun's own report; what the last whole checkpoint holds is left, and goes on."""
    settings = {"release": str(release), "parts": {"fsdp_size": 2}, "kill": [1, 4]}
    cases = json.dumps([["killed", "train", settings | {"save_strategy": "steps", "save_steps": 2}]])
    launcher = "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())
    command = [sys.executable, *launcher, distributed_runs.__file__, str(tmp_path), cases]
    launched = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(command, env=launched, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode != 0
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", run.stderr), run.stderr[-3000:]
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    assert newest_whole(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
