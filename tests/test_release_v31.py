"""A release in the manner of DeepSeek-V3.1 (powers of two as scales, norms and router biases in fp32): loaded, computed with, saved bit for bit."""

import json

import pytest
import torch
from releases import FP8, SHAPES, dequantize_independently, same_bits, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.quantized.linear import QuantizedLinear


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v31")
    tensors = write_release(folder, SHAPES["v3-mtp"](), fp8=True)
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensors[name] = torch.exp2(torch.log2(tensor).round())
        elif tensor.ndim == 1:
            tensors[name] = tensor.float() + 1e-4 * torch.randn(tensor.shape)  # more digits than bf16 has
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}))
    return folder, tensors


def test_saved_bit_for_bit(release, tmp_path):
    folder, stored = release
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == stored.keys() and all(same_bits(found[name], stored[name]) for name in stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ids = torch.arange(3, 20)[None]
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_what_was_trained_is_rounded_and_the_rest_is_not(release, tmp_path):
    """From values: changed norms in the model's dtype, everything else as the file has it, scales by its rule."""
    folder, stored = release
    values = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    norm, weight = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    wanted = dequantize_independently(stored[weight], stored[f"{weight}_scale_inv"])
    assert torch.equal(values.get_parameter(weight).double(), wanted)
    with torch.no_grad():
        values.get_parameter(norm).mul_(2)
        values.get_parameter(weight).mul_(1.5)
    values.save_pretrained(tmp_path, quantize="fp8", like=folder)
    found = load_file(tmp_path / "model.safetensors")
    changed = {norm, weight, f"{weight}_scale_inv"}
    kept = [name for name in stored if name not in changed]
    assert found.keys() == stored.keys() and all(same_bits(found[name], stored[name]) for name in kept)
    assert torch.equal(found[norm].float(), 2 * stored[norm])
    scales = found[f"{weight}_scale_inv"]
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))


def test_norms_are_computed_with_as_they_are(release):
    folder, stored = release
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert torch.equal(model.get_parameter(norm), stored[norm])
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    half = dsm.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(half.get_buffer(bias), stored[bias])  # which chooses experts: fp32 whatever the rest is in
