"""llama.cpp's converter, as in llama-cpp-python 0.3.36: `conversion/base.py` and `conversion/deepseek.py`.

It decodes codes to floating point first, and then names tensors for a GGUF file, a layer's experts stacked. It has no place for
the MTP layers of this architecture.
"""

import re

from receivers.table import FLOAT, Folder, Parameter

VERSION = "0.3.36"
ARCHITECTURES = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}
METHODS = {"fp8", "compressed-tensors"}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",  # the converter splits it into attn_k_b and attn_v_b
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BIAS = "mlp.gate.e_score_correction_bias"
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.(.*)")
# Next to a weight of codes; the converter wants all of them to decode it, and no others.
SUFFIXES = ("weight_scale_inv", "weight_packed", "weight_scale", "weight_shape", "weight")


def models(folder: Folder) -> list[dict[str, Parameter]]:
    """What the file will hold: for a weight in codes a slot for each tensor that it is decoded from."""
    config, found = folder.config, []
    width, inner, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
    latent, query = config.kv_lora_rank, heads * config.qk_head_dim
    shapes = {
        "self_attn.q_a_proj": (config.q_lora_rank, width),
        "self_attn.q_b_proj": (query, config.q_lora_rank),
        "self_attn.q_proj": (query, width),
        "self_attn.kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, width),
        "self_attn.kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "self_attn.o_proj": (width, heads * config.v_head_dim),
    }
    dense = {f"mlp.{name}_proj": (config.intermediate_size, width) for name in ("gate", "up")}
    dense["mlp.down_proj"] = (width, config.intermediate_size)
    wide = inner * (config.n_shared_experts or 0)
    shared = {f"mlp.shared_experts.{name}_proj": (wide, width) for name in ("gate", "up")}
    shared["mlp.shared_experts.down_proj"] = (width, wide)
    absent = {"self_attn.q_a_proj", "self_attn.q_b_proj"} if config.q_lora_rank is None else {"self_attn.q_proj"}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        is_moe = config.is_moe_layer(layer)
        linear = {name: shape for name, shape in shapes.items() if name not in absent} | (shared if is_moe else dense)
        found += [
            _weight(f"blk.{layer}.{NAMES[name]}", folder.linear(at + name, *shape)) for name, shape in linear.items()
        ]
        norms = {"input_layernorm": width, "post_attention_layernorm": width, "self_attn.kv_a_layernorm": latent}
        norms |= {} if config.q_lora_rank is None else {"self_attn.q_a_layernorm": config.q_lora_rank}
        found += [_weight(f"blk.{layer}.{NAMES[name]}", _plain(size)) for name, size in norms.items()]
        found += _router_and_experts(folder, layer) if is_moe else []
    sizes = {"token_embd": (config.vocab_size, width), "output_norm": (width,), "output": (config.vocab_size, width)}
    found += [_weight(name, _plain(*shape)) for name, shape in sizes.items()]
    return [{one.name: one for one in found}]


def _router_and_experts(folder: Folder, layer: int) -> list[Parameter]:
    config = folder.config
    count, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    found = [_weight(f"blk.{layer}.ffn_gate_inp", _plain(count, width))]
    if config.topk_method == "noaux_tc":
        found.append(Parameter(f"blk.{layer}.exp_probs_b.bias", {"bias": ((count,), FLOAT)}))
    for name, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
        one = folder.linear(f"model.layers.{layer}.mlp.experts.0.{name}_proj", *shape)
        slots = {(expert, suffix): slot for expert in range(count) for suffix, slot in one.items()}
        found.append(Parameter(f"blk.{layer}.ffn_{name}_exps.weight", slots))
    return found


def _plain(*shape: int) -> dict:
    return {"weight": (shape, FLOAT)}


def _weight(name: str, slots: dict) -> Parameter:
    return Parameter(f"{name}.weight", slots)


def load(folder: Folder, parameters: list[dict[str, Parameter]]) -> list[str]:
    """Puts every tensor where it goes; returns the names of those that are left out: MTP layers."""
    (file,), unread = parameters, []
    for name, tensor in folder.tensors():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= folder.config.num_hidden_layers:
            unread.append(name)
            continue
        local = name.removeprefix(layer[0]) if layer else name
        prefix, names = (f"blk.{layer[1]}.", NAMES) if layer else ("", OUTSIDE)
        if expert := EXPERT.fullmatch(local):
            file[f"{prefix}ffn_{expert[2]}_exps.weight"].put((int(expert[1]), expert[3]), tensor, name)
        elif local == BIAS:
            file[f"{prefix}exp_probs_b.bias"].put("bias", tensor, name)
        else:
            suffix = next(one for one in SUFFIXES if local.endswith("." + one))
            file[f"{prefix}{names[local.removesuffix('.' + suffix)]}.weight"].put(suffix, tensor, name)
    return unread
