"""Layers as operands: what an operation may know of a module without calling it.

An operation that multiplies with a layer's weight is handed the layer, since only that knows what is attached to its call:
an adapter, a quantiser, a hook. Where nothing is, its weight may be read in place of the call.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as every_module_is_hooked  # torch has no public name for it

from modeling_deepseek_moe.bitsandbytes_packing import is_packed
from modeling_deepseek_moe.ops._library import PLAIN

KERNEL = "block_fp8"  # a format's, see `formats.WeightFormat`
BLOCK = (128, 128)  # of FP8 weights: the engine's, and the release's


def is_hooked(module: nn.Module) -> bool:
    """Whether something happens when the module is called besides the ``forward`` of its class."""
    # looked for where they are kept: `hasattr` takes a microsecond to find nothing, for each module and token
    own = module.__dict__
    forward = own["_forward_hooks"] or own["_forward_pre_hooks"] or "_hf_hook" in own or "forward" in own
    return bool(forward or own["_backward_hooks"] or own["_backward_pre_hooks"])


def is_linear(layer: nn.Module) -> bool:
    """Whether calling the layer multiplies with its weight, adds its bias, and does nothing else."""
    return is_plain(layer) or (is_quantized(layer) and not is_hooked(layer) and not every_module_is_hooked())


def is_plain(layer: nn.Module) -> bool:
    """Whether it is ``torch.nn.Linear`` itself, with a weight of torch's own and nothing attached to its call."""
    # a quantiser, or sharding, may leave the class and replace the weight by a tensor subclass of its own
    if type(layer) is not nn.Linear or type(layer._parameters.get("weight")) not in PLAIN:
        return False
    return not is_hooked(layer) and not every_module_is_hooked()


def is_quantized(layer: nn.Module) -> bool:
    """Whether it is this package's `QuantizedLinear`, which is defined further up."""
    return isinstance(layer, nn.Linear) and "weight_format" in layer.__dict__ and hasattr(layer, "dequantized")


def unsupported_format(weight_format) -> str | None:
    """Why the CPU engine has no kernels for a `formats.WeightFormat`; ``None`` if it has."""
    if weight_format.kernel != KERNEL or weight_format.linear is None:
        return f"has kernels for FP8 and bf16 weights, found {weight_format.name}"
    if weight_format.block != BLOCK:
        return f"has blocks of {BLOCK[0]} × {BLOCK[1]} only, found {weight_format.block}"
    return None


def is_four_bit(layer: nn.Module) -> bool:
    """Whether it is bitsandbytes' ``Linear4bit`` itself, with codes in their own order: its call may change that on a CPU."""
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    kind = type(layer)
    is_bnb = kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")
    return is_bnb and state is not None and not is_packed(layer) and not is_hooked(layer) and layer.bias is None


def _dequantized(weight: nn.Parameter) -> torch.Tensor:
    """What the codes of a 4-bit weight stand for. Read through its call it would take fifty times as long."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def unsupported_linear(layer: nn.Module) -> str | None:
    """Why a fused operation cannot read this layer's weight where it lies; ``None`` if it can."""
    if every_module_is_hooked():
        return "cannot call hooks that are on every module"
    if not is_linear(layer):
        return f"needs plain linear layers, found {_called(layer)}"
    if layer.bias is not None:
        return "needs linear layers without bias"
    return unsupported_format(layer.weight_format) if is_quantized(layer) else None


def scale_of(layer: nn.Module) -> torch.Tensor | None:
    """The scales of a quantised weight, ``None`` for any other."""
    return layer.scale if is_quantized(layer) else None


def weight_of(layer: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """The weight ``[N, K]`` that calling the layer multiplies with, in the dtype and on the device of ``like``."""
    if is_linear(layer):
        return layer.dequantized(like.dtype) if is_quantized(layer) else layer.weight.to(like.dtype)
    if is_four_bit(layer):
        return _dequantized(layer.weight).to(like.dtype)
    # an adapter, another quantiser or an offloading hook wraps the weight: it is read through the call
    return layer(torch.eye(layer.in_features, dtype=like.dtype, device=like.device)).T


def _called(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    kind = _named(type(module)) + (" with a hook" if is_hooked(module) else "")
    # torchao leaves the class as it is
    return kind if type(module) is not nn.Linear or type(weight) in PLAIN else f"{kind} with a {_named(type(weight))}"


def _named(kind: type) -> str:
    own = kind.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
    return kind.__name__ if own else f"{kind.__module__}.{kind.__name__}"
