"""Tensors that accelerate's ``cpu_offload`` and ``disk_offload`` took out of a model, found where they keep them."""

from collections.abc import Iterator

import torch
from torch import nn


def with_offloaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict with what its hooks hold in place of meta tensors: views of memory, or of mapped files."""
    tensors = model.state_dict()
    if getattr(model, "hf_device_map", None) is None and any(tensor.is_meta for tensor in tensors.values()):
        for prefix, module in model.named_modules():
            for hook in _hooks(module):
                for name in (*module._parameters, *module._buffers):
                    full = f"{prefix}.{name}" if prefix else name
                    if full in tensors and tensors[full].is_meta:
                        tensors[full] = hook.weights_map[name]
    return tensors


def _hooks(module: nn.Module) -> Iterator:
    """The module's hooks that hold its tensors."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # several hooks in a row are one that has them
        if getattr(part, "weights_map", None) is not None:
            yield part
