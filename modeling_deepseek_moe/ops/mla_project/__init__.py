"""Queries and latents of latent attention for a few new tokens. The definition is `attention.DeepseekAttention`'s own
sequence of layers."""

from modeling_deepseek_moe.ops.mla_project import cpu, triton

__all__ = ["cpu", "triton"]
