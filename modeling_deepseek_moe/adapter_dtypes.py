"""PEFT gives an adapter the dtype of the weight that it changes; beside FP8 weights that would be FP8."""

import torch
from torch import nn

from modeling_deepseek_moe.ops import block_fp8


def widen_adapters(model: nn.Module, new_values: bool = False) -> None:
    """Give adapters that took an FP8 weight's dtype fp32, as PEFT's own models do: FP8 neither trains nor keeps them.

    Args:
        model: a model that may have adapters, with ``peft_config`` once it does.
        new_values: draw their first values anew, as the adapter's config wants them: FP8 has rounded them to three
            bits. Not for those about to be loaded.
    """
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            for adapter, layer in getattr(module, name, {}).items():
                if _is_fp8(layer):
                    _widen(layer)
                    if new_values and isinstance(layer, nn.Linear):
                        _draw(module, adapter, layer, getattr(model.peft_config[adapter], "init_lora_weights", None))


def _parameters(layer: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(layer.parameters()) if isinstance(layer, nn.Module) else [layer]


def _is_fp8(layer: nn.Module | nn.Parameter) -> bool:
    return any(parameter.dtype == block_fp8.FP8_DTYPE for parameter in _parameters(layer))


def _widen(layer: nn.Module | nn.Parameter) -> None:
    for parameter in _parameters(layer):
        parameter.data = parameter.data.to(torch.float32)


def _draw(module: nn.Module, adapter: str, layer: nn.Linear, initialisation: bool | str | None) -> None:
    """LoRA's own initialisations; others work from the weight, and have failed on an FP8 one already."""
    if initialisation is False:
        layer.reset_parameters()
        return
    is_lora = initialisation is True or initialisation == "gaussian"
    if is_lora and not any(_is_fp8(part[adapter]) for part in (module.lora_A, module.lora_B)):  # both are wide now
        module.reset_lora_parameters(adapter, initialisation)
