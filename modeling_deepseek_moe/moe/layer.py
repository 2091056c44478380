"""One mixture-of-experts layer: router, routed experts and shared experts, with or without a norm after them."""

import torch
from torch import nn

from modeling_deepseek_moe.layers import DeepseekMLP, DeepseekRMSNorm
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.moe.training_state import TrainingPass


class DeepseekMoE(nn.Module):
    """``h ↦ Σ_k g_k · expert_k(h) + shared(h)`` (DeepSeek-V3 report, eq. 12). No token is dropped."""

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__()
        self.layer_idx = layer_idx
        self.gate = DeepseekTopkRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None) -> torch.Tensor:
        logits, topk_weights, topk_indices = self.gate(hidden_states)
        if training_pass is not None:
            router = self.gate.base_layer if hasattr(self.gate, "base_layer") else self.gate  # in an adapter
            topk_weights = training_pass.observe(self.layer_idx, router, logits, topk_indices, topk_weights)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = self.experts(hidden_TD, topk_indices, topk_weights).view(hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class NormedMoE(DeepseekMoE):
    """A mixture whose sum is normed before it joins the residual (A.X-K1)."""

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.post_mlp_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None) -> torch.Tensor:
        return self.post_mlp_layernorm(super().forward(hidden_states, training_pass))
