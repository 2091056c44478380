"""Tiny releases of the other model types: fields and tensor names spelled out as they are published, nothing by this package."""

import json
from pathlib import Path

import torch
from releases import FP8, write_release
from safetensors.torch import load_file, save_file

from modeling_deepseek_moe.families import FAMILIES

CLASSES = {config.model_type: config for config in FAMILIES.values()}
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MOE = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
}
COUNTS = {"n_routed_experts": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
YARN = {
    "type": "yarn",
    "factor": 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
FIELDS = {
    "glm4_moe_lite": SHAPE
    | MOE
    | COUNTS
    | {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "eos_token_id": [2, 7],
    },
    "youtu": {name: value for name, value in SHAPE.items() if name != "pad_token_id"}
    | {
        "model_type": "youtu",
        "architectures": ["YoutuForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 1600000,
        "rope_interleave": True,
        "initializer_range": 0.02,
        "embedding_initializer_range": 0.04,
    },
    "sarvam_mla": SHAPE
    | MOE
    | {
        "model_type": "sarvam_mla",
        "architectures": ["SarvamMLAForCausalLM"],
        "num_experts": 16,
        "num_shared_experts": 1,
        "q_lora_rank": None,
        "head_dim": 40,
        "q_head_dim": 24,
        "rope_theta": 10000,
        "rope_scaling": YARN | {"type": "deepseek_yarn"},
        "moe_router_enable_expert_bias": True,
    },
    "axk1": SHAPE
    | MOE
    | COUNTS
    | {
        "model_type": "axk1",
        "architectures": ["AXK1ForCausalLM"],
        "n_group": 4,
        "topk_group": 2,
        "ep_size": 8,
        "topk_method": "noaux_tc",
        "rope_theta": 10000,
    },
}
# with heads enough that no two keys score zero: of equals plain transformers takes any
INDEXER = {"index_topk": 8, "index_n_heads": 16, "index_head_dim": 16}
FIELDS["deepseek_v32"] = (
    SHAPE
    | MOE
    | COUNTS
    | INDEXER
    | {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_theta": 10000,
        "rope_scaling": YARN,
    }
)
FIELDS["glm_moe_dsa"] = (
    SHAPE
    | MOE
    | COUNTS
    | INDEXER
    | {
        "model_type": "glm_moe_dsa",
        "architectures": ["GlmMoeDsaForCausalLM"],
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "rope_interleave": True,
        "indexer_rope_interleave": True,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_topk_freq": 2,
        "index_skip_topk_offset": 2,
        "index_topk_pattern": None,
        "index_share_for_mtp_iteration": True,
        "indexer_types": ["full", "full", "shared"],
    }
)
TEXT = (
    {name: value for name, value in SHAPE.items() if name != "pad_token_id"}
    | MOE
    | COUNTS
    | {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000,
        "rope_scaling": YARN,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }
)
VISION = {
    "model_type": "kimi_k25_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "patch_size": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
}
FIELDS["kimi_k25"] = {
    "model_type": "kimi_k25",
    "architectures": ["KimiK25ForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "media_placeholder_token_id": 100,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "vision_config": VISION,
    "projection_hidden_size": 32,
    "text_config": TEXT,
}


def spelled(kind: str, name: str) -> str:
    """The release's name of a tensor of DeepSeek-V3's naming."""
    if kind == "kimi_k25":
        return f"language_model.{name}"
    return name.replace(".mlp.post_mlp_layernorm.", ".post_mlp_layernorm.")


def extra_tensors(kind: str) -> dict[str, torch.Tensor]:
    """What the release has and a text model does not read."""
    if kind == "kimi_k25":
        names = ("vision_tower.a.weight", "vision_tower.blocks.0.b.bias", "mm_projector.c.weight")
        return {name: torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16() for name in names}
    return {"model.layers.0.post_mlp_layernorm.weight": torch.randn(64).bfloat16()} if kind == "axk1" else {}


def write_family(folder: Path, kind: str, *, fp8: bool = False) -> dict[str, torch.Tensor]:
    """A release in one file; returns its tensors."""
    fields = json.loads(json.dumps(FIELDS[kind]))
    write_release(folder, CLASSES[kind].from_dict(fields), fp8=fp8)
    tensors = {spelled(kind, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    if kind == "axk1":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("e_score_correction_bias")}
    tensors |= extra_tensors(kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if fp8:
        (fields["text_config"] if kind == "kimi_k25" else fields)["quantization_config"] = dict(FP8)
    (folder / "config.json").write_text(json.dumps(fields))
    return tensors
