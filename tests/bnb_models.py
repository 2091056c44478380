"""Models with routed experts by bitsandbytes, and the same of a layer of bitsandbytes' own for each projection."""

import copy

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from releases import COMMON, V3, write_release
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.moe.experts import DeepseekExperts

IDS = torch.arange(3, 27)[None]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SIZES = {
    "hidden_size": 128,
    "n_shared_experts": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "intermediate_size": 128,
}
# The first as the releases are: rows of whole blocks. In the second a block of 64 values goes on in the next row. Shared
# experts are twice as wide: bitsandbytes' own layers can be packed for CPUs in rows of whole blocks only.
WIDTHS = {"blocks": 192, "ragged": 96}
KINDS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}


def write_folders(tmp_path_factory):
    """Of random weights, in bf16 and in FP8, by the experts' width."""
    found = {}
    for name, width in WIDTHS.items():
        config = dsm.DeepseekV3Config(
            **(COMMON | V3 | SIZES | {"moe_intermediate_size": width, "num_hidden_layers": 2})
        )
        for fp8 in (False, True):
            found[name, fp8] = tmp_path_factory.mktemp(name)
            write_release(found[name, fp8], config, fp8=fp8)
    return found


def wish(kind="nf4", compute=torch.float32, **others):
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **others)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **KINDS[kind], **others)


def load(folder, config=None, **settings):
    if config is not None:
        settings["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def apart(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


class OneByOne(nn.Module):
    """The definition: a layer of bitsandbytes' own for each projection of each expert."""

    def __init__(self, stacks: DeepseekExperts, layer_of):
        super().__init__()
        self.act_fn = stacks.act_fn
        self.experts = nn.ModuleList()
        for gate_up, down in zip(stacks.gate_up_proj.detach(), stacks.down_proj.detach(), strict=True):
            weights = dict(zip(PROJECTIONS, (*gate_up.chunk(2), down), strict=True))
            self.experts.append(nn.ModuleDict({name: layer_of(weight.clone()) for name, weight in weights.items()}))

    def forward(self, hidden, indices, weights):
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            tokens, slots = (indices == index).nonzero(as_tuple=True)
            x = hidden[tokens]
            y = expert["down_proj"](self.act_fn(expert["gate_proj"](x)) * expert["up_proj"](x))
            out.index_add_(0, tokens, (y * weights[tokens, slots, None]).to(out.dtype))
        return out


class InOneRow(Linear4bit):
    """For rows of no whole blocks, which bitsandbytes misreads on CPUs with AVX-512 unless they are one."""

    def forward(self, x):
        state = copy.copy(self.weight.quant_state)
        shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
        weight = dequantize_4bit(self.weight.data, state).view(shape)
        given = x.to(self.compute_dtype)
        return nn.functional.linear(given, weight.to(given.dtype)).to(x.dtype)


def four_bit_layer(weight, config):
    rows, columns = weight.shape
    layer = (InOneRow if columns % 64 else Linear4bit)(
        *(columns, rows, False, config.bnb_4bit_compute_dtype),
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    )
    layer.weight = Params4bit(
        weight, False, compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type
    )
    layer.support_avx512bf16_for_cpu = False  # packed, it would round to bf16
    return layer.to("cpu")


def one_by_one(folder, config, **settings):
    """The same model with experts left alone, and then turned into layers of bitsandbytes one by one."""
    model = load(folder, wish_like(config, llm_int8_skip_modules=["lm_head", "experts"]), **settings)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            assert type(layer.mlp.experts) is DeepseekExperts
            layer.mlp.experts = OneByOne(layer.mlp.experts, lambda weight: four_bit_layer(weight, config)).eval()
    return model


def wish_like(config, **changes):
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return BitsAndBytesConfig(**(fields | changes))
