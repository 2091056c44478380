"""Rotary position embedding of the decoupled key and query parts, with YaRN and the other published scalings.

The rotation runs in fp32 (or wider), on interleaved pairs (x₂ᵢ, x₂ᵢ₊₁) as released, and leaves them interleaved.
"""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class DeepseekRotaryEmbedding(nn.Module):
    """Cosine and sine tables ``[B, S, qk_rope_head_dim / 2]`` in fp32 for given positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        """``theta^(-2i/d)`` for the d = ``qk_rope_head_dim`` rotary features, and no scaling of the amplitude."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * self.inv_freq.to(device=x.device, dtype=torch.float)
        if self.attention_scaling == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotate ``x [B, H, S, d]`` by tables ``[B, S, d/2]``; pairs are neighbours, or halves if not ``interleave``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if interleave:
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        even, odd = wide.chunk(2, dim=-1)
    rotated = (even * cos - odd * sin, even * sin + odd * cos)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleave else torch.cat(rotated, dim=-1)
    return out.to(x.dtype)
