"""Inspecting a folder from its headers, against what loading says of it."""

import json

import pytest
import torch
from releases import SHAPES, write_release
from test_anatomy import V3
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import (
    CheckpointError,
    CheckpointReader,
    inspect_checkpoint,
)


def test_inspecting_does_not_read_scales(tmp_path):
    # a NaN scale is for the loading to find; the headers do not show it
    tensors = write_release(tmp_path, SHAPES["v3"](), fp8=True)
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    info = CheckpointReader.open(tmp_path)[name]
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        stream.write(torch.tensor([float("nan")]).numpy().tobytes())
    assert inspect_checkpoint(tmp_path).is_loadable


def rewrite(folder, change):
    """Apply ``change`` to the tensors of a single-file checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q_A = "model.layers.0.self_attn.q_a_proj.weight"

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"

BROKEN = {
    "missing": lambda tensors: tensors.pop(Q_A) is tensors.pop(f"{Q_A}_scale_inv"),
    "shape": lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
    "dtype": lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
    "scale": lambda tensors: tensors.update({f"{Q_A}_scale_inv": torch.ones(2, 1)}),
    "mixed": lambda tensors: tensors.update({EXPERT: torch.ones(64, 32)}) or tensors.pop(f"{EXPERT}_scale_inv"),
    "surplus": lambda tensors: tensors.update({"model.layers.9.input_layernorm.weight": torch.ones(64)}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_inspecting_finds_what_loading_refuses(tmp_path, kind):
    write_release(tmp_path, SHAPES["v3"](), fp8=True)
    rewrite(tmp_path, BROKEN[kind])
    found = inspect_checkpoint(tmp_path)
    assert not found.is_loadable
    assert list(found.findings_by_kind()) == ["dtype" if kind == "mixed" else kind]
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.findings[0].message.partition(": ")[0] in str(caught.value)


def test_harmless_oddities_do_not_make_a_folder_unloadable(tmp_path):
    config = SHAPES["v3"]()
    write_release(tmp_path, config)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    found = inspect_checkpoint(tmp_path)
    assert found.is_loadable
    assert {finding.kind for finding in found.findings} == {"no mtp", "ignored"}
    assert found.parts["other"].tensors == 1


@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
def test_a_half_finished_download_is_listed_file_by_file(tmp_path, fp8):
    write_release(tmp_path, SHAPES["v3-mtp"](), fp8=fp8, shards=4)  # weights and scales in different shards
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with (tmp_path / "model-00004-of-00004.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    found = inspect_checkpoint(tmp_path)
    assert not found.is_loadable
    # the tensors of those files are not missing one by one
    assert [(finding.kind, finding.where[:11]) for finding in found.findings] == [
        ("file", "model-00002"),
        ("file", "model-00004"),
    ]
    assert "no such file" in found.findings[0].message
    assert "truncated" in found.findings[1].message


def test_an_index_that_disagrees_with_the_files(tmp_path):
    write_release(tmp_path, SHAPES["v3"](), shards=2)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.gone.weight"] = "model-00001-of-00002.safetensors"
    index_file.write_text(json.dumps(index))
    messages = [finding.message for finding in inspect_checkpoint(tmp_path).findings]
    assert any("model.gone.weight" in message and "absent" in message for message in messages)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    with pytest.raises(CheckpointError, match="found neither"):
        inspect_checkpoint(tmp_path)
