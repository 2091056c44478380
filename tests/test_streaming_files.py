"""Streaming from files that are cut short, replaced or unreadable: an error by name, and the same bits afterwards."""

import os
import shutil

import pytest
from releases import SHAPES, same_bits, write_release
from test_streaming import PROMPT, SLOT, load, logits

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.origin import Origin
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.streaming import reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "release"
    write_release(folder, SHAPES["v3-mtp"](), fp8=True, shards=3)
    return folder


@pytest.fixture
def mapped(folder):
    return load(folder)


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A folder to damage; whether its files changed is not looked at, so that reading finds out."""
    monkeypatch.setattr(MappedExperts, "check_seconds", 1e9)
    monkeypatch.setattr(Origin, "check", lambda self, model: None)
    return shutil.copytree(folder, tmp_path / "own")


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_file_cut_short(own, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(reader, "fcntl", None)
    model = load(own, 4 * SLOT)
    logits(model, PROMPT[:, :1])
    embedding = model.model.embed_tokens.weight
    embedding.data = embedding.clone()  # the one tensor of a streamed model that is still read from the mapped file
    for file in own.glob("*.safetensors"):
        os.truncate(file, 5000)
    with pytest.raises(
        CheckpointError, match=r"safetensors: tensor model.layers.\d.*proj.weight: found \d+ bytes, wanted 2048"
    ):
        for i in range(36):
            logits(model, PROMPT[:, i : i + 1])


def test_a_file_replaced(own):
    model = load(own, 4 * SLOT)
    for file in own.glob("*.safetensors"):
        other = file.with_suffix(".new")
        other.write_bytes(file.read_bytes()[:-4096])
        other.replace(file)
    with pytest.raises(CheckpointError, match="changed after the checkpoint was opened"):
        logits(model)


def test_errors_of_the_disk(folder, mapped, monkeypatch):
    model = load(folder, 4 * SLOT)
    logits(model, PROMPT[:, :1])
    with monkeypatch.context() as patch:

        def fail(descriptor, buffers, offset):
            raise OSError(5, "Input/output error")

        patch.setattr(os, "preadv", fail)
        for _ in range(3):
            with pytest.raises(
                CheckpointError, match=r"tensor model.layers.*: found Input/output error while reading"
            ):
                logits(model)
    assert same_bits(logits(model), logits(mapped))  # the disk is back


def test_errors_of_the_computation(folder, mapped, monkeypatch):
    model = load(folder, 3 * SLOT)

    def fail(*args):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("modeling_deepseek_moe.ops.experts.accumulate", fail)
        patch.setattr(MappedExperts, "expert", fail)
        with pytest.raises(MemoryError):
            logits(model)
    assert same_bits(logits(model), logits(mapped))
