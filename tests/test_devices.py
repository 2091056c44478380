"""`device_map`, offloading to the disk, and the attention implementations beyond eager and sdpa."""

import pytest
import torch
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts

OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, OFFLOADED], ids=["cpu", "auto", "dict", "disk"])
@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
def test_device_map(tmp_path, fp8, device_map):
    write_release(tmp_path / "release", SHAPES["v3-mtp"](), fp8=fp8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32)
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "release", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    home = (StackedQuantizedExperts if device_map is OFFLOADED else MappedExperts) if fp8 else DeepseekExperts
    assert type(placed.model.layers[1].mlp.experts) is home
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        # offloading hooks keep a SwiGLU from running in one call: other sums, same values
        torch.testing.assert_close(placed(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(ids)
    found = placed.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, plain.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
def test_accelerator(tmp_path, fp8):
    write_release(tmp_path / "release", SHAPES["v3"](), fp8=fp8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32)
    device = torch.accelerator.current_accelerator().type
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32, device_map=device)
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        for path in ("expanded", "absorbed"):
            found = placed(ids.to(device), mla_path=path).logits.cpu()
            torch.testing.assert_close(found, plain(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_flex_attention(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3"]())
    settings = {"dtype": torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "release", **settings)
    flex = AutoModelForCausalLM.from_pretrained(tmp_path / "release", attn_implementation="flex_attention", **settings)
    ids = torch.randint(3, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        found, wanted = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (flex, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found, wanted = (model.generate(ids, attention_mask=mask, **GREEDY) for model in (flex, plain))
    assert torch.equal(found, wanted)
