"""How a model of this family is divided among ranks: transformers' styles by module, ``*`` for a layer's number.

Attention is divided by heads. Latents are whole on every rank, and what makes them is divided by what it reads (`latents`). What a
model does not have is taken out (`plans`).
"""

from typing import Any

from transformers import PreTrainedConfig

# styles of `latents`
LATENT, KV_LATENT = "deepseek_moe_latent", "deepseek_moe_kv_latent"

TENSOR = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_a_proj": LATENT,
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": KV_LATENT,
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "layers.*.embed_tokens": "embedding_rowwise",  # of MTP layers, as what follows
    "layers.*.eh_proj": "colwise_gather_output",
    "layers.*.shared_head.head": "colwise_gather_output",
}
PIPELINE = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}
SHARDED: dict[Any, str] = {
    **PreTrainedConfig.base_model_fsdp_plan,
    "layers.*.shared_head.head": "free_full_weight",  # called after its MTP layer
}
EXPERTS = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}
