"""What tests of evaluation share: a small random model with the tiny checkpoint's tokenizer, and rows to ask."""

import json

import torch
from transformers import AutoTokenizer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import DeepseekV3Config


def small_config(**changes) -> DeepseekV3Config:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "vocab_size": len(tokenizer()),
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return DeepseekV3Config(**{**sizes, **changes})


def tokenizer():
    return AutoTokenizer.from_pretrained(dsm.tiny_checkpoint())


def small_model(**changes) -> dsm.DeepseekV3ForCausalLM:
    """fp32, random, the same every time."""
    torch.manual_seed(0)
    return dsm.DeepseekV3ForCausalLM(small_config(**changes)).eval()


def write_math(folder, count):
    """``count`` problems of different lengths in MATH-500's columns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem": f"Ada has {i} pens" + " and buys 2 more" * (i % 4) + ". How many?",
            "solution": f"\\boxed{{{i}}}",
            "answer": str(i),
            "subject": "sum",
            "level": 1,
            "unique_id": f"own/{i}",
        }
        for i in range(count)
    ]
    (folder / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
