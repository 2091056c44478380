"""Other quantisers on bf16 folders, beside plain transformers on the same weights."""

from collections import Counter

import pytest
import torch
import transformers
from releases import COMMON, V3, write_release
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import modeling_deepseek_moe as dsm

IDS = torch.arange(3, 27)[None]


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


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
}


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
    ours = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISERS[name](), **settings).eval()
    theirs = plain(folder, quantization_config=QUANTISERS[name](), **settings)
    assert type(ours) is dsm.DeepseekV3ForCausalLM
    assert kinds(ours) == kinds(theirs) and len(kinds(ours)) > 1
    assert ours.get_memory_footprint() <= theirs.get_memory_footprint()
    if name == "8bit":
        return  # plain's forward fails in bitsandbytes on a CPU: outliers of three-dimensional activations
    with torch.no_grad():
        wanted, found = theirs(IDS).logits.float(), ours(IDS).logits.float()
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


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
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_fp8_release_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"found FP8 weights.*fp8-to-bf16"):
        AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), quantization_config=QUANTISERS["nf4"]())
