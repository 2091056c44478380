"""Routed experts in bitsandbytes' 4-bit formats that stay in the memory-mapped files of a saved model."""

from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesMatrices
from modeling_deepseek_moe.quantized.mapped import MappedExperts


class MappedBitsAndBytesExperts(MappedExperts, BitsAndBytesMatrices):
    """Codes as they lie in the files and scales, plain ones, in memory: no load time, and streamed where memory is short."""
