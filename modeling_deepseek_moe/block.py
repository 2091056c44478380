"""One decoder layer: latent attention, then a dense SwiGLU or a mixture of experts, pre-normed with residuals."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.compat import takes_cache
from modeling_deepseek_moe.layers import DeepseekMLP, DeepseekRMSNorm
from modeling_deepseek_moe.moe.layer import DeepseekMoE, NormedMoE
from modeling_deepseek_moe.moe.training_state import TrainingPass
from modeling_deepseek_moe.sparse_attention import DeepseekSparseAttention


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    """``h += attention(norm(h)); h += mlp(norm(h))``; returns ``[B, q, hidden_size]``."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = (DeepseekSparseAttention if config.has_indexers else DeepseekAttention)(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp = (NormedMoE if config.has_post_mlp_norm else DeepseekMoE)(config, layer_idx)
        else:
            self.mlp = DeepseekMLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None, **kwargs
    ) -> torch.Tensor:
        if training_pass is not None and training_pass.indexers is not None:
            kwargs["training_pass"] = training_pass
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        observed = (training_pass,) if training_pass is not None and isinstance(self.mlp, DeepseekMoE) else ()
        return hidden_states + self.mlp(normed, *observed)
