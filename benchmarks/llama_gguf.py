"""A checkpoint of DeepSeek's family as a GGUF file in Q8_0 or Q4_0, for `cpu.py --llama-bench`.

    pip install gguf
    python benchmarks/llama_gguf.py /tmp/model-e2e /tmp/q8_0.gguf
    llama-quantize --allow-requantize /tmp/q8_0.gguf /tmp/q4_k_m.gguf Q4_K_M   which gguf for Python has no writer of

For measuring speed alone: the file has no tokenizer, and llama.cpp's own converter makes better ones. The weights are the
checkpoint's, dequantised and rounded to Q8_0 (int8 and a scale for 32: 8.5 bits each) or Q4_0 (4.5 bits, but for the head
in Q8_0, where `llama-quantize` takes Q6_K); what llama.cpp wants in fp32 stays so.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe  # noqa: F401  (registers the model)

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
KEPT = ("norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")  # fp32


def tensors(model: torch.nn.Module):
    """llama.cpp's names and tensors: experts stacked, ``kv_b_proj`` as W_UK (transposed) and W_UV, a head at a time."""
    config = model.config
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        layer, local = (f"blk.{parts[2]}.", ".".join(parts[3:])) if parts[1] == "layers" else ("", name)
        if local == "self_attn.kv_b_proj.weight":
            heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
            k, v = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            yield layer + "attn_k_b.weight", k.transpose(1, 2).contiguous()
            yield layer + "attn_v_b.weight", v.contiguous()
        elif local == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield layer + "ffn_gate_exps.weight", gate
            yield layer + "ffn_up_exps.weight", up
        elif local == "mlp.experts.down_proj":
            yield layer + "ffn_down_exps.weight", tensor
        else:
            yield layer + NAMES[local], tensor


def describe(writer: gguf.GGUFWriter, config) -> None:
    """The keys of llama.cpp's `deepseek2`; its latent attention is one key-value head of width kv_lora_rank + rope."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="a folder: V3's architecture, FP8 or bf16; `cpu.py --model-folder`"
    )
    parser.add_argument("gguf", type=Path, help="the file to write, replaced if it is there")
    parser.add_argument("--type", choices=("q8_0", "q4_0"), default="q8_0", help="of the matrices (default: q8_0)")
    parser.add_argument("--bf16-head", action="store_true", help="leave the head in bf16, as FP8 releases do")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    unfinished = options.gguf.with_name(options.gguf.name + ".unfinished")
    writer = gguf.GGUFWriter(unfinished, "deepseek2", use_temp_file=True)
    describe(writer, model.config)
    types = gguf.GGMLQuantizationType
    head = types.BF16 if options.bf16_head else types.Q8_0
    for name, tensor in tqdm(list(tensors(model)), desc=f"to {options.type.upper()}", unit="tensor"):
        values = tensor.float().numpy()
        kind = types.F32 if name.endswith(KEPT) else head if name == "output.weight" else types[options.type.upper()]
        writer.add_tensor(name, np.ascontiguousarray(gguf.quantize(values, kind)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(options.gguf)


if __name__ == "__main__":
    main()
