"""Adapters on routed experts in bitsandbytes' formats, next to the same on the dequantised model."""

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from bnb_models import IDS, WIDTHS, apart, load, wish, write_folders  # noqa: E402

pytestmark = pytest.mark.tools

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OTHERS = [
    "lm_head",
    "model.layers.0",
    ".*self_attn",
    ".*shared_experts",
]  # which bitsandbytes packs for a CPU, and rounds


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory)


def adapted(model, stacks=STACKS):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], target_parameters=stacks, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stacks", [STACKS, []], ids=["experts", "attention alone"])
@pytest.mark.parametrize("kind", ["nf4", "fp4-double", "int8", "saved nf4"])
def test_outputs_and_gradients_are_those_of_the_dequantised_model(folders, tmp_path, kind, width, stacks):
    def quantised():
        config = wish(kind.removeprefix("saved "), llm_int8_skip_modules=OTHERS)
        return load(folders[width, False], config, dtype=torch.float32)

    model = quantised()
    if kind.startswith("saved"):
        model.save_pretrained(tmp_path)
        model = load(tmp_path, dtype=torch.float32)
    found = []
    for own in (adapted(model, stacks), adapted(quantised().dequantize(), stacks)):
        out = own(input_ids=IDS, labels=IDS)
        out.loss.backward()
        with torch.no_grad():
            one = own(input_ids=IDS[:, :1]).logits
        gradients = {name: p.grad for name, p in own.named_parameters() if p.requires_grad}
        found.append({"all": out.logits.detach(), "one": one} | gradients)
    assert found[0].keys() == found[1].keys() and sum("experts" in name for name in found[0]) == 2 * len(stacks)
    assert all(apart(ours, found[1][name]) < 1e-5 for name, ours in found[0].items())


def test_what_peft_would_fail_at_is_refused_by_name(folders):
    model = load(folders["blocks", False], wish("nf4", llm_int8_skip_modules=["lm_head", "q_b_proj"]))
    config = peft.LoraConfig(target_modules=["q_b_proj"], modules_to_save=["o_proj"])
    with pytest.raises(ValueError, match=r"o_proj: found bitsandbytes' codes, wanted .*llm_int8_skip_modules"):
        peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"proj: found bitsandbytes' codes, wanted .*peft_type=LOHA"):
        peft.get_peft_model(model, peft.LoHaConfig(target_modules="all-linear"))
    with pytest.raises(
        ValueError, match=r"o_proj: found bitsandbytes' codes, wanted .*init_lora_weights='orthogonal'"
    ):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights="orthogonal"))
    adapter = peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["o_proj"], total_step=2, init_r=2))
    with pytest.raises(
        ValueError, match=r"adapter default: found the codes of bitsandbytes' Linear4bit to merge by .*adalora"
    ):
        adapter.merge_adapter()
    model = adapter.unload()
    config = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["q_b_proj"], lora_bias=True)
    adapter = peft.get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match=r"o_proj: adapter default: found lora_bias=True and no bias in the layer"):
        adapter.merge_and_unload()
