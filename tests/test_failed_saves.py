"""Saves that fail, on a full disk, an interruption or bad arguments: the error says why, and the folder is as before."""

import dataclasses
import errno
import resource
import shutil
from pathlib import Path

import pytest
import torch
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from modeling_deepseek_moe.checkpoint import writer

EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"
FORMATS = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])


def contents(folder) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.fixture(params=["new-folder", "onto-another-save", "onto-its-own-files"])
def failing_save(request, tmp_path):
    """``check(model, error, *fragments, **settings)``: saving raises the error, and the folder is as before."""
    folder = tmp_path / ("release" if request.param == "onto-its-own-files" else "saved")
    if request.param == "onto-another-save":
        write_release(folder, SHAPES["v3"](), seed=1, shards=4)
        (folder / "notes.txt").write_text("kept")

    def check(model, error, *fragments, **settings):
        before = contents(folder)
        with pytest.raises(error) as caught:
            model.save_pretrained(folder, **settings)
        for fragment in fragments:
            assert str(fragment) in str(caught.value)
        assert contents(folder) == before
        return caught.value

    return check


def load(tmp_path, fp8, **settings):
    write_release(tmp_path / "release", SHAPES["v3-mtp"](), fp8=fp8, shards=3)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "release", **settings)


# what is loaded, and into how many files it is saved
SAVES = pytest.mark.parametrize(
    "fp8, max_shard_size",
    [pytest.param(False, "5GB", id="bf16-to-one-file"), pytest.param(True, "50KB", id="fp8-to-shards")],
)


@SAVES
def test_disk_full_while_writing(tmp_path, monkeypatch, failing_save, fp8, max_shard_size):
    """`/dev/full` stands for the last file of weights: the kernel itself says that there is no space."""
    model = load(tmp_path, fp8)
    last = "model-00006-of-" if max_shard_size == "50KB" else "model.safetensors"
    monkeypatch.setattr(Path, "open", opening({last: "/dev/full"}))
    error = failing_save(model, OSError, last, "No space left", "bytes", max_shard_size=max_shard_size)
    assert error.errno == errno.ENOSPC


def opening(instead):
    """`Path.open`, but writing to a file whose name contains a key opens the value."""
    real = Path.open

    def open_(self, mode="r", *args, **kwargs):
        other = next((Path(other) for part, other in instead.items() if part in self.name and "w" in mode), self)
        return real(other, mode, *args, **kwargs)

    return open_


@FORMATS
def test_disk_full_at_the_config(tmp_path, monkeypatch, failing_save, fp8):
    model = load(tmp_path, fp8)
    monkeypatch.setattr(Path, "open", opening({"config.json": "/dev/full"}))
    failing_save(model, OSError, "config.json", "No space left", "bytes")


@SAVES
def test_disk_full_within_a_tensor(tmp_path, failing_save, fp8, max_shard_size):
    """The file system takes 40 kB a file: the write stops halfway and leaves a partial temporary file to remove."""
    model = load(tmp_path, fp8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        error = failing_save(model, OSError, "saf", "bytes", max_shard_size=max_shard_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.errno == errno.EFBIG


@FORMATS
def test_too_little_space(tmp_path, monkeypatch, failing_save, fp8):
    model = load(tmp_path, fp8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    error = failing_save(model, OSError, "found 1000 bytes free", "wanted ")
    assert error.errno == errno.ENOSPC


@SAVES
def test_interrupted(tmp_path, monkeypatch, failing_save, fp8, max_shard_size):
    def interrupt():
        raise KeyboardInterrupt

    def plan(name, tensor, of=writer.TensorPlan.of):
        made = of(name, tensor)
        return dataclasses.replace(made, produce=interrupt) if name == "model.norm.weight" else made

    model = load(tmp_path, fp8)
    monkeypatch.setattr(writer.TensorPlan, "of", plan)
    failing_save(model, KeyboardInterrupt, max_shard_size=max_shard_size)


@SAVES
@pytest.mark.parametrize("at", [0, 2, "config.json"], ids=["first", "third", "config"])
def test_interrupted_while_renaming(tmp_path, monkeypatch, failing_save, fp8, max_shard_size, at):
    targets, interrupts = [], []
    real = Path.replace

    def replace(self, target):
        targets.append(target)
        if at in (len(targets) - 1, target.name) and not interrupts:
            interrupts.append(target)
            raise KeyboardInterrupt
        return real(self, target)

    model = load(tmp_path, fp8)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        failing_save(model, KeyboardInterrupt, max_shard_size=max_shard_size)


@SAVES
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_quantising_what_is_not_finite(tmp_path, failing_save, value, fp8, max_shard_size):
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if fp8 else {}
    model = load(tmp_path, fp8, **settings)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[3, 5, 7] = value
    failing_save(
        model,
        ValueError,
        ".safetensors",
        EXPERT,
        "found NaN or Inf",
        "wanted finite",
        quantize="fp8",
        max_shard_size=max_shard_size,
    )


@FORMATS
def test_unknown_quantize(tmp_path, failing_save, fp8):
    failing_save(load(tmp_path, fp8), ValueError, "'int3'", "wanted 'fp8' or 'fp8_ue8m0'", quantize="int3")


def test_folder_is_a_file(tmp_path):
    model = load(tmp_path, fp8=False)
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(NotADirectoryError, match="found a file"):
        model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "a file"
