"""Inputs that cannot be converted: a clear error that names file, tensor, found and wanted, and nothing left over."""

import errno
import json
import shutil

import pytest
import torch
from releases import write_release
from safetensors.torch import load_file, save_file
from test_conversion_roundtrip import CONFIG, convert, ok

from modeling_deepseek_moe.conversion import _job

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SCALE = O_PROJ + "_scale_inv"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "fp8"
    write_release(folder, CONFIG, fp8=True, shards=3)
    return folder


@pytest.fixture
def bad(release, tmp_path):
    return shutil.copytree(release, tmp_path / "bad")


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(folder, name, tensor):
    file = shard_of(folder, name)
    save_file(load_file(file) | {name: tensor}, file, metadata={"format": "pt"})


def refused(*arguments):
    result = convert(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def truncate(folder):
    file = shard_of(folder, O_PROJ)
    file.write_bytes(file.read_bytes()[:-10])


def spoil_header(folder):
    file = shard_of(folder, O_PROJ)
    file.write_bytes(file.read_bytes()[:8] + b"?" + file.read_bytes()[9:])


def spoil_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


FAULTS = {
    "truncated": (truncate, "truncated"),
    "header": (spoil_header, "not JSON"),
    "shard gone": (lambda folder: shard_of(folder, O_PROJ).unlink(), "no file model-"),
    "mixed blocks": (lambda folder: change(folder, SCALE, torch.ones(2, 16)), "in blocks of [128, 128]"),
    "scale dtype": (lambda folder: change(folder, SCALE, torch.ones(1, 8).bfloat16()), "wanted torch.float32"),
    "zero scale": (lambda folder: change(folder, SCALE, torch.zeros(1, 8)), "wanted finite scales above zero"),
    "infinite scale": (lambda folder: change(folder, SCALE, torch.full((1, 8), torch.inf)), "above zero"),
    "scale without FP8": (lambda folder: change(folder, O_PROJ, torch.ones(128, 1024).bfloat16()), "bfloat16"),
    "block size": (
        lambda folder: spoil_config(folder, quantization_config={"weight_block_size": [128, "x"]}),
        "wanted two sizes",
    ),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_dequantised(bad, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(bad)
    assert message in refused("fp8-to-bf16", bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial/*.safetensors.tmp"))


def test_weights_that_no_code_can_hold(release, tmp_path):
    ok("fp8-to-bf16", release, tmp_path / "wide")
    file = next(iter((tmp_path / "wide").glob("*.safetensors")))
    tensors = load_file(file)
    tensors[O_PROJ][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused("bf16-to-fp8", tmp_path / "wide", tmp_path / "out")
    assert O_PROJ in message and "NaN or Inf" in message
    assert "FP8 already" in refused("bf16-to-fp8", release, tmp_path / "out")
    assert "found no torch.float8_e4m3fn tensor" in refused("fp8-to-bf16", tmp_path / "wide", tmp_path / "other")


def test_ranks_that_do_not_agree(release, tmp_path):
    ok("hf-to-native", release, tmp_path / "native", "--world-size", 2)
    file = tmp_path / "native" / "model1-mp2.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"][0] += 1
    save_file(tensors, file)
    assert "found other bytes" in refused("native-to-hf", tmp_path / "native", tmp_path / "out")
    file.unlink()
    assert "model1-mp2.safetensors" in refused("native-to-hf", tmp_path / "native", tmp_path / "other")
    assert "wanted a multiple of 3" in refused("hf-to-native", release, tmp_path / "x", "--world-size", 3)


def test_a_disk_without_room(release, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(_job.shutil, "disk_usage", lambda path: Usage)
    assert "found 1000 bytes free" in refused("reshard", release, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(release, tmp_path, monkeypatch):
    """Finished shards stay, and the same command goes on once there is room."""
    write, written = _job.write_shard, []

    def full(path, name, *rest):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, name, *rest)
        written.append(name)

    monkeypatch.setattr(_job, "write_shard", full)
    command = ("reshard", release, tmp_path / "out", "--max-shard-size", "1MB", "--workers", 1)
    assert "No space left" in refused(*command)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == written
    before = (tmp_path / "out.partial" / written[0]).stat().st_mtime_ns
    monkeypatch.undo()
    ok(*command)
    assert (tmp_path / "out" / written[0]).stat().st_mtime_ns == before
    assert "identical" in ok("diff", release, tmp_path / "out")
