"""Other quantisers on bf16 folders, next to plain transformers on the same weights."""

from collections import Counter

import pytest
import torch
import transformers
from releases import COMMON, V3, write_release
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

import modeling_deepseek_moe as dsm

pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.tools

IDS = torch.arange(3, 27)[None]


def torchao_config(kind="Int8WeightOnlyConfig"):
    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), kind)())


QUANTISERS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "fp4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32
    ),
    "double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "skip": lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "o_proj"]),
    "torchao": torchao_config,
    "torchao-dynamic": lambda: torchao_config("Int8DynamicActivationInt8WeightConfig"),
}


def but_experts(name):
    """Plain leaves routed experts alone, and has no other way."""
    config = QUANTISERS[name]()
    if isinstance(config, BitsAndBytesConfig):
        config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ["lm_head"]), "experts"]
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    # bitsandbytes wants rows in blocks of 32, columns in blocks of 64 on a CPU
    sizes = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "intermediate_size": 128}
    write_release(path, dsm.DeepseekV3Config(**(COMMON | V3 | sizes | {"moe_intermediate_size": 64})))
    return path


def plain(folder, **settings):
    config = transformers.DeepseekV3Config.from_pretrained(folder)
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, **settings).eval()


def kinds(model):
    def of(module):
        return type(module).__name__, type(module.weight).__name__

    return Counter(of(module) for module in model.modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("name", QUANTISERS)
def test_every_linear_layer_that_plain_quantises(folder, name):
    settings = {"device_map": "cpu", "dtype": torch.float32}
    ours = AutoModelForCausalLM.from_pretrained(folder, quantization_config=but_experts(name), **settings).eval()
    theirs = plain(folder, quantization_config=but_experts(name), **settings)
    assert type(ours) is dsm.DeepseekV3ForCausalLM
    assert kinds(ours) == kinds(theirs) and len(kinds(ours)) > 1
    assert PreTrainedModel.get_memory_footprint(ours) <= theirs.get_memory_footprint()
    wanted, found = tensors(theirs), tensors(ours)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
    with torch.no_grad():
        found = ours(IDS).logits.float()
        if name == "8bit":
            # plain hands kv_b_proj four dims, for which bitsandbytes dies on a CPU: its weights have to do without it
            theirs = dequantized(folder, theirs)
        wanted = theirs(IDS).logits.float()
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def tensors(model):
    """Codes, scales and all else that a state dict holds, as plain tensors."""
    found = model.state_dict()
    return {
        name: t.dequantize() if type(t) is not torch.Tensor and "torchao" in type(t).__module__ else t
        for name, t in found.items()
    }


def dequantized(folder, eight_bit):
    from bitsandbytes.functional import int8_vectorwise_dequant

    model = plain(folder, dtype=torch.float32)
    for name, layer in eight_bit.named_modules():
        if type(layer).__name__ == "Linear8bitLt":
            model.get_submodule(name).weight.data = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return model


def test_eight_bits_decode_as_they_read_a_prompt(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISERS["8bit"](), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(IDS, mla_path="expanded").logits
        found = model(IDS, mla_path="absorbed").logits
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    settings = {"do_sample": False, "max_new_tokens": 8}
    assert model.generate(IDS, **settings).shape[1] > IDS.shape[1]


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("name", QUANTISERS)
def test_saved_and_loaded(folder, tmp_path, name, forward_first):
    ours = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISERS[name](), device_map="cpu")
    with torch.no_grad():
        if forward_first:
            ours(IDS)
        ours.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        assert kinds(again) == kinds(ours)
        # routed experts are no entries where they stay in the files
        wanted, found = ({n: t for n, t in tensors(m).items() if ".experts." not in n} for m in (ours, again))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_torchao_in_place_is_plain_and_saving_says_the_way_out(folder, tmp_path):
    """Plain transformers dies in the middle of saving, of "an invalid python storage", and leaves half a folder."""
    torchao = pytest.importorskip("torchao.quantization")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = plain(folder, dtype=torch.float32)
    assert ours.engine_report().rows[0].reason.startswith("q_a_proj: takes weights in")
    for model in (ours, theirs):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    wanted, found = tensors(theirs), tensors(ours)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3)
        absorbed, expanded = ours(IDS, mla_path="absorbed").logits, ours(IDS, mla_path="expanded").logits
    torch.testing.assert_close(absorbed, expanded, rtol=1e-3, atol=1e-3)
    assert "found Linear with a torchao.quantization.Int8Tensor" in str(ours.engine_report())
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"q_a_proj.weight: found torchao.*Int8Tensor.*TorchAoConfig"):
        ours.save_pretrained(out)
    assert not out.exists()


def test_the_report_names_the_foreign_layers(folder):
    settings = {"llm_int8_skip_modules": ["lm_head", "gate_proj", "up_proj", "down_proj"], "load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    reasons = {row.name: row.reason for row in model.engine_report().rows}
    assert reasons["0.self_attn"] == "q_a_proj: needs plain linear layers, found bitsandbytes.nn.modules.Linear8bitLt"
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    if model.engine_report().unavailable is None:
        assert reasons["0.mlp"] is reasons["1.mlp"] is reasons["lm_head"] is None
        assert model.engine_report().calls == model.config.num_hidden_layers


def test_fp8_release_is_refused_for_torchao_with_the_way_out():
    with pytest.raises(ValueError, match=r"found FP8 weights.*fp8-to-bf16"):
        AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), quantization_config=torchao_config())
