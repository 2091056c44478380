"""bitsandbytes' 4-bit layers on CPUs with AVX512-BF16, whose first call without gradients packs the weight in place.

A packed layer decodes fast, and that is all it can do: it passes no gradient on, what reads its weight takes the packed codes
for plain ones (peft's merge and DoRA do), and its state dict has the scales of other rows. So a layer whose weight is read
is never packed, and the others are unpacked before they are trained or saved.
"""

import torch
from torch import nn

from modeling_deepseek_moe.compat import ModelMixin

FLAG = "support_avx512bf16_for_cpu"  # of a layer: that it may pack
READ = ("kv_b_proj", "base_layer")  # children that are read: by absorbed attention, and by peft around them


class FourBitMixin(ModelMixin):
    """What reads, trains or saves 4-bit weights finds them unpacked. Mixed in before `PreTrainedModel`."""

    def state_dict(self, *args, **kwargs):
        unpack(self)
        return super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True):
        keep_readable(self)
        if mode:
            unpack(self)
        return super().train(mode)


def keep_readable(model: nn.Module) -> None:
    """Layers that are read as well as called stay unpacked."""
    for module in model.modules():
        keep_children_readable(module)


def keep_children_readable(module: nn.Module) -> None:
    """As `keep_readable`, of a module's own children alone."""
    for name in READ:
        layer = module._modules.get(name)
        if layer is not None and layer.__dict__.get(FLAG):
            unpack(layer)
            setattr(layer, FLAG, False)


def unpack(model: nn.Module) -> None:
    """Undo the packing of all 4-bit layers, scales included.

    bitsandbytes undoes it where it makes a state dict, and leaves plain scales (not those of double quantisation) turned.
    """
    for module in model.modules():
        if is_packed(module):
            state = module.weight.quant_state
            module.state_dict()
            if state.absmax.ndim == 2:  # [K / blocksize, N], wanted as the codes lie
                state.absmax = state.absmax.T.reshape(-1).float()


def is_packed(layer: nn.Module) -> bool:
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def is_foreign(layer: nn.Module) -> bool:
    """Whether a layer is of a class of bitsandbytes' own."""
    return type(layer).__module__.startswith("bitsandbytes.")


def is_quantized_by_bitsandbytes(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' with codes, which one that still waits for a weight to quantise has not."""
    weight = module._parameters.get("weight")
    return is_foreign(module) and weight is not None and not weight.is_floating_point()


def without_classes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose codes are plain tensors: bitsandbytes' own classes hold in attributes what is an entry of its own here."""
    return {
        name: tensor.as_subclass(torch.Tensor) if type(tensor).__module__.startswith("bitsandbytes.") else tensor
        for name, tensor in tensors.items()
    }
