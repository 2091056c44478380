"""Kimi-K2.5's INT4 experts under ``language_model.``: mapped, streamed, saved to the bit; and its bad input."""

import json

import pytest
import torch
from families import FIELDS, spelled
from releases import same_bits
from safetensors.torch import load_file, save_file
from test_int4_release import ROUTED, announced, unpack, write_int4
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError, inspect_checkpoint, read_config
from modeling_deepseek_moe.quantized.mapped import MappedExperts

IDS = torch.arange(3, 20)[None]
VISION = {"vision_tower.a.weight": torch.arange(20.0).reshape(4, 5).bfloat16()}


@pytest.fixture
def folder(tmp_path):
    """Its config's announcement is within ``text_config``, with names that a vision tower has too."""
    fields = json.loads(json.dumps(FIELDS["kimi_k25"]))
    fields["text_config"]["quantization_config"] = announced([*ROUTED, "re:vision_tower.*", "re:mm_projector.*"])
    bare = json.loads(json.dumps(FIELDS["kimi_k25"]))
    tensors = write_int4(tmp_path / "kimi", dsm.KimiK25Config.from_dict(bare))
    tensors = {spelled("kimi_k25", name): tensor for name, tensor in tensors.items()} | VISION
    save_file(tensors, tmp_path / "kimi" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(fields))
    return tmp_path / "kimi"


def test_mapped_streamed_and_saved(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    experts = [module for module in model.modules() if isinstance(module, MappedExperts)]
    assert len(experts) == 2
    assert sum(module.mapped_bytes for module in experts) <= 0.57 * sum(module.num_mapped for module in experts)
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    exact = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    stored = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.experts.5.down_proj.weight"
    wanted = unpack(stored[f"{name}_packed"], stored[f"{name}_scale"]).float()
    assert torch.equal(exact.state_dict()["model.layers.1.mlp.experts.down_proj"][5], wanted)
    with torch.no_grad():
        mapped, wanted = model(IDS).logits, exact(IDS).logits
        assert (mapped.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
        model.set_expert_memory(200_000)
        assert torch.equal(model(IDS).logits, mapped)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(same_bits(again[name], stored[name]) for name in stored)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert before.pop("text_config").items() <= after.pop("text_config").items()
    assert before == {key: value for key, value in after.items() if key in before}
    assert "quantization_config" not in after
    assert not inspect_checkpoint(tmp_path / "again").findings


def test_an_announcement_around_the_text_model_counts_too(folder, tmp_path):
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = fields["text_config"].pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(fields))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(module, MappedExperts) for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    assert after["quantization_config"] == fields["quantization_config"]
    assert "quantization_config" not in after["text_config"]


def test_packed_of_a_wrong_shape_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.2.mlp.experts.3.up_proj.weight_packed"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: found shape \[32, 7\], wanted \[32, 8\]"):
        AutoModelForCausalLM.from_pretrained(folder)
    found = inspect_checkpoint(folder)
    assert not found.is_loadable and name in found.findings[0].message


@pytest.mark.parametrize(
    "group, message",
    [({"num_bits": 8}, "num_bits"), ({"symmetric": False}, "symmetric")],
    ids=["8 bits", "asymmetric"],
)
def test_another_scheme_is_refused(folder, group, message):
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"] |= group
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_config(folder)
