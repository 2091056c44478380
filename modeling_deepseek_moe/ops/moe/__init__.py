"""A whole mixture-of-experts layer. The definition is `moe.layer.DeepseekMoE`'s own sequence of layers."""

from modeling_deepseek_moe.ops.moe import cpu, triton

__all__ = ["cpu", "triton"]
