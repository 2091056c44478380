"""One decoding step of a run of layers. The definition is the loop over the layers in `DeepseekMoeModel`."""

from modeling_deepseek_moe.ops.decode_step import cpu

__all__ = ["cpu"]
