"""Which experts a token goes to, and with which weight: the family's three top-k methods, always in fp32.

Legend: T tokens, E experts, K experts per token, D hidden size.
"""

from collections.abc import Mapping

import torch
from torch import nn

from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.ops.routing import Routing, route, scores


class DeepseekTopkRouter(KeepsDtype):
    """Router of one MoE layer (DeepSeek-V3 report, eq. 12-16; V2 with softmax scores).

    ``forward`` returns ``router_logits [T, E]``, ``topk_weights [T, K]`` (fp32) and ``topk_indices [T, K]``.
    ``e_score_correction_bias`` (noaux_tc only) picks experts but does not weigh them; it is fp32 through any cast.
    """

    dtype_kept: Mapping[str, torch.dtype] = {"e_score_correction_bias": torch.float32}

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.n_group = config.n_group or 1
        self.topk_group = config.topk_group or 1
        self.scoring_func = config.scoring_func
        self.topk_method = config.topk_method
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size))
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if self.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.bias_release_dtype = torch.float32  # how the checkpoint that was loaded stores the bias

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return route(hidden_TD, self.weight, self.e_score_correction_bias, self.routing)

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The unbiased scores of all experts."""
        return scores(logits_TE, self.routing)

    @property
    def routing(self) -> Routing:
        """How this router chooses. V2's methods either normalise or scale; V3's does both."""
        grouped = self.topk_method != "greedy" and self.n_group > 1
        is_v3, normalise = self.topk_method == "noaux_tc", self.norm_topk_prob and self.top_k > 1
        return Routing(
            n_group=self.n_group if grouped else 1,
            topk_group=self.topk_group if grouped else 1,
            top_k=self.top_k,
            softmax=self.scoring_func != "sigmoid",
            group_score_top2=is_v3,
            norm_topk_prob=normalise,
            scaling_factor=self.routed_scaling_factor if is_v3 or not normalise else 1.0,
        )
