"""Sharded checkpoints read by one process: consolidated to a release, and refused by name where they are not whole."""

import os
import pickle
import shutil

import pytest
import torch
from releases import SHAPES, write_release
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError, CheckpointReader, ShardedTrainingCallback
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.distributed.checkpoints import fault_of, newest_whole
from modeling_deepseek_moe.distributed.chunks import read_chunks

FOLDER = "pytorch_model_fsdp_0"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, SHAPES["v3-mtp"]())
    return folder


@pytest.fixture(scope="module")
def state(release):
    return AutoModelForCausalLM.from_pretrained(release, dtype="bfloat16").state_dict()


@pytest.fixture(scope="module")
def run(release, state, tmp_path_factory):
    """Two checkpoints as FSDP2 leaves them."""
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        for name, part in ((FOLDER, {"model": state}), ("optimizer_0", {"optimizer": {"a": torch.ones(4)}})):
            dcp.save(part, storage_writer=dcp.FileSystemWriter(checkpoint / name), no_dist=True)
        (checkpoint / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    shutil.copy(release / "config.json", folder)
    return folder


@pytest.fixture
def again(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def consolidate(checkpoint, out, *more):
    return CliRunner().invoke(app, ["convert", "consolidate", str(checkpoint), str(out), *map(str, more)])


def test_the_release_is_made_of_the_shards(run, state, tmp_path):
    result = consolidate(run / "checkpoint-4", tmp_path / "out", "--max-shard-size", "300KB")
    assert result.exit_code == 0, result.output
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in state.items())
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".json"} == {
        "config.json",
        "model.safetensors.index.json",
    }


def test_transformers_own_shards(release, state, tmp_path):
    folder = tmp_path / "shards"
    writer = dcp.hf_storage.HuggingFaceStorageWriter(
        path=str(folder), save_distributed=True, enable_consolidation=False
    )
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    shutil.copy(release / "config.json", folder)
    result = consolidate(folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    made = CheckpointReader.open(tmp_path / "out")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert torch.equal(made.tensor(name), state["model.layers.2.mlp.experts.gate_up_proj"][3].chunk(2)[1])


def test_boxes_are_read_by_rows(run, state):
    tensor = read_chunks(run / "checkpoint-2" / FOLDER)["model.layers.1.mlp.experts.gate_up_proj"]
    wanted = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(tensor.read((2, 5, 3), (3, 7, 20)), wanted[2:5, 5:12, 3:23])
    assert torch.equal(tensor.read((15, 63, 0), (1, 1, 64)), wanted[15:, 63:])


def lose(folder, pattern):
    next(folder.glob(pattern)).unlink()


def cut(folder, pattern):
    file = next(folder.glob(pattern))
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "no-metadata": (lambda c: lose(c, f"{FOLDER}/.metadata"), "a save into it did not end"),
    "no-shard": (lambda c: lose(c, f"{FOLDER}/*.distcp"), r"found no __0_0.distcp, wanted that shard"),
    "cut-shard": (lambda c: cut(c, f"{FOLDER}/*.distcp"), r"__0_0.distcp: found \d+ bytes, wanted \d+"),
    "cut-metadata": (lambda c: cut(c, f"{FOLDER}/.metadata"), "found no usable metadata"),
    "no-moments": (lambda c: lose(c, "optimizer_0/.metadata"), "optimizer_0: found neither"),
    "no-state": (lambda c: lose(c, "trainer_state.json"), "trainer_state.json"),
}


@pytest.mark.parametrize("damage, fault", DAMAGES.values(), ids=DAMAGES)
def test_one_that_is_not_whole_is_passed_over(again, damage, fault):
    assert newest_whole(again) == again / "checkpoint-4"
    damage(again / "checkpoint-4")
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(fault_of(again / "checkpoint-4"))
    assert newest_whole(again) == again / "checkpoint-2"


@pytest.mark.parametrize("name", ["no-metadata", "no-shard", "cut-shard"])
def test_a_part_that_is_missing_is_named(again, tmp_path, name):
    DAMAGES[name][0](again / "checkpoint-4")
    result = consolidate(again / "checkpoint-4", tmp_path / "out")
    assert result.exit_code != 0 and not (tmp_path / "out").exists()
    assert FOLDER in result.output.replace("\n", "")


def test_other_configs_are_refused(run, again, tmp_path):
    (again / "config.json").unlink()
    result = consolidate(again / "checkpoint-4", tmp_path / "out")
    assert "found no config.json" in result.output and "--config" in result.output
    write_release(tmp_path / "other", SHAPES["moonlight"]())
    result = consolidate(again / "checkpoint-4", tmp_path / "out", "--config", tmp_path / "other")
    assert result.exit_code != 0 and "self_attn.q_proj.weight: found none" in " ".join(result.output.split())


def test_metadata_calls_nothing(again):
    """It is a pickle, and a checkpoint may come from anywhere."""
    file = again / "checkpoint-4" / FOLDER / ".metadata"
    file.write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(CheckpointError, match=r"\.metadata: found no usable metadata \(\w+\.getcwd is named in it\)"):
        read_chunks(file.parent)


@pytest.mark.parametrize(
    "history, found",
    [([{"loss": 3.0}], "cannot go on"), ([{"loss": 2.0}], "another training"), (None, "no checkpoint")],
)
def test_states_of_another_training_are_refused(tmp_path, history, found):
    """Trainer goes on from a folder that it tells no callback of; one of the same number lies in ``output_dir``, or none."""
    state = TrainerState(global_step=3, log_history=[{"loss": 3.0}])
    if history is not None:
        (tmp_path / "checkpoint-3").mkdir()
        TrainerState(global_step=3, log_history=history).save_to_json(tmp_path / "checkpoint-3" / "trainer_state.json")
    arguments = TrainingArguments(tmp_path, save_only_model=True, report_to=[])
    with pytest.raises(ValueError, match=rf"checkpoint-3: (found )?.*{found}"):
        ShardedTrainingCallback().on_train_begin(arguments, state, None)
