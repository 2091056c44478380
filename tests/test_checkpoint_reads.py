"""What a folder may hold instead of a checkpoint: pipes, devices, absurd counts, zero scales. Every door refuses it at once."""

import io
import json
import os
import shutil
import signal

import pytest
import torch
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.ranges import read_range
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.config import MAX_EXPERTS, MAX_LAYERS

SCALE = "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv"


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def in_time():
    """A door that waits for ever fails."""

    def late(*_):
        raise TimeoutError("still waiting after 30 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_folder(path):
    path.mkdir()


@pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "shards"])
@pytest.mark.parametrize("make, found", [(make_pipe, "a pipe"), (make_device, "a device")], ids=["pipe", "device"])
def test_no_shard_but_a_pipe_or_a_device(tmp_path, in_time, make, found, shards):
    write_release(tmp_path / "in", SHAPES["v3"](), shards=shards)
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[-1]
    shard.unlink()
    make(shard)
    message = f"{shard.name}: found {found}, wanted a regular file"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    code, output = run("inspect", tmp_path / "in")
    assert code in (1, 2) and f"found {found}, wanted a regular file" in output
    assert run("convert", "reshard", tmp_path / "in", tmp_path / "out") == (2, f"error: {tmp_path}/in/{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_no_config_but_a_pipe(tmp_path, in_time, name):
    write_release(tmp_path / "in", SHAPES["v3"](), shards=3)
    (tmp_path / "in" / name).unlink()
    make_pipe(tmp_path / "in" / name)
    for command in (("inspect", tmp_path / "in"), ("convert", "reshard", tmp_path / "in", tmp_path / "out")):
        code, output = run(*command)
        assert code == 2 and f"{name}: found a pipe, wanted a regular file" in output


def test_native_ranks_of_an_absurd_number(tmp_path, in_time):
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "model0-mp2000000000.safetensors").write_bytes(b"")
    code, output = run("convert", "native-to-hf", folder, tmp_path / "out")
    assert code == 2 and "model1-mp2000000000.safetensors: found no such file, wanted 2000000000 ranks" in output
    fields = {"n_routed_experts": None, "num_experts_per_tok": None}
    write_release(tmp_path / "in", type(SHAPES["v3"]())(**(SHAPES["v3"]().to_dict() | fields)))
    code, output = run("convert", "hf-to-native", tmp_path / "in", tmp_path / "out", "--world-size", 2_000_000_000)
    assert code == 2 and "--world-size 2000000000 is not a number of ranks" in output


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_hidden_layers": 2_000_000_000}, f"must be at most {MAX_LAYERS} together"),
        ({"num_nextn_predict_layers": 2**40}, f"must be at most {MAX_LAYERS} together"),
        ({"n_routed_experts": 2_000_000_000}, "must be at most 87381 in 3 layers"),
        ({"n_routed_experts": MAX_EXPERTS // 3 // 4 * 4 + 4}, "must be at most 87381 in 3 layers"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 must be at least 0"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
    ],
)
def test_counts_beyond_any_model(tmp_path, in_time, fields, message):
    write_release(tmp_path / "in", SHAPES["v3"]())
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    for command in ("plan", "inspect"):
        code, output = run(command, tmp_path / "in")
        assert code == 2 and message in output and "config.json" in output
    code, output = run("convert", "bf16-to-fp8", tmp_path / "in", tmp_path / "out")
    assert code == 2 and message in output
    for door in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            door.from_pretrained(tmp_path / "in")


def test_the_largest_models_are_far_from_the_bounds():
    kimi = SHAPES["kimi"]()
    config = type(kimi)(**(kimi.to_dict() | {"num_hidden_layers": 122, "n_routed_experts": 1024}))
    assert config.n_routed_experts == 1024


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-3, torch.nan, torch.inf])
def test_one_rule_for_scales_at_every_door(tmp_path, value):
    write_release(tmp_path / "in", SHAPES["v3"](), fp8=True)
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    tensors[SCALE][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"{SCALE}: found {value}\d* at \[0, 0\], wanted finite scales above zero"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    code, output = run("convert", "fp8-to-bf16", tmp_path / "in", tmp_path / "out")
    assert code == 2 and f"{SCALE}: found {value}" in output and "at [0, 0], wanted finite scales above zero" in output
    code, output = run("convert", "verify", tmp_path / "in")
    assert code == 1 and SCALE in output and "not sound: 1 finding in" in output


def test_a_small_scale_is_a_scale(tmp_path):
    write_release(tmp_path / "in", SHAPES["v3"](), fp8=True)
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    tensors[SCALE][0, 0] = 2.0**-140  # subnormal in fp32
    save_file(tensors, file, metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    assert run("convert", "fp8-to-bf16", tmp_path / "in", tmp_path / "out")[0] == 0
    assert run("convert", "verify", tmp_path / "in")[0] == 0


class Dribble(io.BytesIO):
    """A file that gives three bytes a read, as one may that is interrupted."""

    def readinto(self, memory):
        return super().readinto(memoryview(memory)[:3])


def test_a_range_is_read_in_full():
    data = bytes(range(100))
    memory = bytearray(50)
    read_range(Dribble(data), 7, memoryview(memory), "file: tensor w")
    assert memory == data[7:57]
    with pytest.raises(CheckpointError, match="file: tensor w: found the file's end at 100, wanted 110 bytes"):
        read_range(Dribble(data), 60, memoryview(memory), "file: tensor w")


@pytest.mark.parametrize(
    "content, found",
    [
        (b"{", "found a file that is not JSON"),
        (b"\xff\xfe\x00", "found a file that is not JSON"),
        (b"[" * 100_000, "found a file that is not JSON"),
        (b"[1]", "found a list, wanted a JSON object"),
        (None, "found no such file"),
    ],
    ids=["cut", "binary", "deep", "list", "absent"],
)
def test_json_that_cannot_be_used_is_named(tmp_path, content, found):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=found) as caught:
        read_json(file, "the config of a test")
    assert str(file) in str(caught.value) and "the config of a test" in str(caught.value)
    make_folder(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="found a folder, wanted a regular file"):
        read_json(tmp_path / "folder")


def test_errors_are_sentences(tmp_path):
    """What the system says, without its number."""
    write_release(tmp_path / "in", SHAPES["v3"]())
    shutil.copytree(tmp_path / "in", tmp_path / "there")
    found = "found it already there, wanted a new folder"
    assert run("convert", "reshard", tmp_path / "in", tmp_path / "there") == (2, f"error: {tmp_path}/there: {found}")
    (tmp_path / "file").write_text("")
    code, output = run("convert", "reshard", tmp_path / "in", tmp_path / "file" / "out")
    assert code == 2 and output.startswith(f"error: {tmp_path}/file") and "Errno" not in output
    pytest.importorskip("datasets")
    wanted = f"error: {tmp_path}/recipe.yaml: found no such file, wanted a YAML file of options"
    assert run("train", tmp_path / "recipe.yaml") == (2, wanted)
