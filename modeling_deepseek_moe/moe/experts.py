"""The routed experts of a layer, stacked and trainable. `quantized` holds those that stay in a release's format.

All take ``hidden [T, D]``, ``topk_indices [T, K]``, ``topk_weights [T, K]`` and return ``[T, D]``.
Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, R rows routed to one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from modeling_deepseek_moe.ops.experts import Implementations, LowRank, routed_swiglu, run_experts


@use_experts_implementation(experts_interface=Implementations())
class DeepseekExperts(nn.Module):
    """``gate_up_proj [E, 2I, D]``, ``down_proj [E, D, I]``: the names that grouped kernels and parallel plans expect.

    ``forward`` is the definition, which ``experts_implementation="eager"`` runs; the default is `ops.experts.routed_swiglu`.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD, topk_indices, topk_weights, low_rank: LowRank | None = None):
        if low_rank is not None:
            return routed_swiglu(self, hidden_TD, topk_indices, topk_weights, low_rank)

        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            gate_RI, up_RI = F.linear(x_RD, self.gate_up_proj[index]).chunk(2, dim=-1)
            return F.linear(self.act_fn(gate_RI) * up_RI, self.down_proj[index])

        return run_experts(hidden_TD, topk_indices, topk_weights, expert, self.num_experts)
