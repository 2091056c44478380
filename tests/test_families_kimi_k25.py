"""Kimi-K2.5 adapted by peft and quantised by bitsandbytes: loaded, saved, loaded, with the release's names and its vision tower."""

import json

import pytest
import torch
from families import extra_tensors, write_family
from releases import same_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.arange(3, 20)[None]
VISION = extra_tensors("kimi_k25")
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=[False, True], ids=["bf16", "fp8"])
def release(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi_k25")
    write_family(folder, "kimi_k25", fp8=request.param)
    return folder


def stored(folder) -> dict[str, torch.Tensor]:
    """What a folder holds: the text model's tensors, and next to them the vision tower's as they came."""
    tensors = load_file(folder / "model.safetensors")
    assert {name for name in tensors if not name.startswith("language_model.")} == VISION.keys()
    assert all(same_bits(tensors[name], VISION[name]) for name in VISION)
    return tensors


def logits(model):
    """With gradients: without, bitsandbytes packs a layer for the processor, and cannot where rows are as short as here."""
    return model.eval()(IDS).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_by_bitsandbytes(release, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(release, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    name = "language_model.model.layers.1.mlp.experts.5.down_proj.weight"
    assert stored(tmp_path)[name].dtype == (torch.int8 if kind == "int8" else torch.uint8)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "kimi_k25" and "quantization_config" not in fields
    assert fields["text_config"]["quantization_config"]["quant_method"] == "bitsandbytes"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted, found = model.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(again), logits(model))


def test_by_peft(release, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_a_proj", "o_proj"], init_lora_weights=False)

    def load(folder=release):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    adapted = peft.get_peft_model(load(), config)
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)  # of the model, not of the release
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    by_transformers = load()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    for model in (loaded, by_transformers, load(tmp_path / "adapter")):
        assert torch.allclose(logits(model), wanted, atol=1e-5)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    stored(tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(merged), atol=1e-5)
