"""Routed experts in bitsandbytes' 4-bit formats that stay in the memory-mapped files of a saved model."""

from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts, BitsAndBytesMatrices
from modeling_deepseek_moe.quantized.mapped import MappedExperts


class MappedBitsAndBytesExperts(MappedExperts, BitsAndBytesMatrices):
    """Codes as they lie in the files and scales, plain ones, in memory: no load time, and streamed where memory is short."""

    def empty_stacks(self) -> BitsAndBytesExperts:
        # the scales are plain: nested ones are read into memory
        settings = {"compute_dtype": self.compute_dtype, "source_dtype": self.source_dtype}
        return BitsAndBytesExperts(self._config, self.weight_format, nested=False, **settings)
