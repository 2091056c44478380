"""What a model with bitsandbytes' layers and experts says of itself, and how it becomes one of floating-point weights again."""

from collections.abc import Iterator

import torch
from torch import nn

from modeling_deepseek_moe.bnb.loading import coded_experts, stacked_experts
from modeling_deepseek_moe.bnb.packing import FourBitMixin, is_foreign, unpack
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesMatrices
from modeling_deepseek_moe.resuming import accept_release_keys
from modeling_deepseek_moe.weights import STACKS


class BitsAndBytesMixin(FourBitMixin):
    """Counts and `dequantize` that take in routed experts. Mixed in before `PreTrainedModel`."""

    def dequantize(self, dtype: torch.dtype | None = None):
        """As `PreTrainedModel.dequantize`, routed experts too: each matrix is decoded into its place in a stack, one at a time."""
        unpack(self)
        coded = coded_experts(self)
        for name, module in coded.items():
            self.set_submodule(name, _dequantized(self.config, module, dtype or self.config.dtype))
        if coded and not any(map(is_foreign, self.modules())):
            self.hf_quantizer.remove_quantization_config(self)  # what transformers does fails without a linear layer
            return self
        return super().dequantize(dtype)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """As `PreTrainedModel.get_memory_footprint`, with the scales that bitsandbytes' layers keep out of its sight."""
        held = sum(tensor.nbytes for module in self.modules() for tensor in _hidden_tensors(module))
        return super().get_memory_footprint(return_buffers) + held

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return count
        stacked = stacked_experts(self).values()  # mapped ones are no parameters, and counted as such
        return count + sum(module.num_values - sum(map(torch.numel, module.parameters())) for module in stacked)


def _dequantized(config, module: BitsAndBytesMatrices, dtype: torch.dtype) -> DeepseekExperts:
    with torch.device("meta"):
        experts = DeepseekExperts(config)
    experts.register_load_state_dict_pre_hook(accept_release_keys)
    device = module.matrices(0)["gate_proj"].codes.device
    for stack in STACKS:
        shape = getattr(experts, stack).shape
        setattr(experts, stack, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
    with torch.no_grad():
        for index in range(module.num_experts):
            matrices = module.matrices(index)
            for stack, projections in STACKS.items():
                places = getattr(experts, stack)[index].chunk(len(projections))
                for place, projection in zip(places, projections, strict=True):
                    place.copy_(module.dequantized(matrices[projection], dtype))
    return experts.train(module.training)


def _hidden_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """What the weight of a module of bitsandbytes carries in attributes."""
    weight = module._parameters.get("weight")
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)  # where the first call puts it
    state = getattr(weight, "quant_state", None)
    found = [scales]
    for part in (state, getattr(state, "state2", None)):
        found += [getattr(part, name, None) for name in ("absmax", "code", "offset")]
    yield from (tensor for tensor in found if isinstance(tensor, torch.Tensor))
