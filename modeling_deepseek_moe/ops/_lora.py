"""What peft's LoRA adds to a linear layer or a router, read from outside, and without importing peft.

The matrices are read where they lie, so that what is written to them counts at once. Whatever an adapter is besides (several at once,
DoRA and its kin, a bias, dropout while it is trained, a batch with one for each sequence) is left to the modules' own calls.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import nn

from modeling_deepseek_moe.ops._hooks import is_hooked
from modeling_deepseek_moe.ops._library import PLAIN
from modeling_deepseek_moe.ops._structs import Adapter, Matrix

# Classes of peft's, by name, and this package's own for its codes: around a linear layer, and around a router's weight.
LINEAR = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}
LINEAR |= {("modeling_deepseek_moe.adapters.layers", "LoraLinear")}
ROUTER = ("peft.tuners.lora.layer", "ParamWrapper")
DTYPES = (torch.float32, torch.bfloat16)
REASON = "runs LoRA of one adapter at a time, in fp32 or bf16, without dropout, a bias or a variant"


class LoraPair(NamedTuple):
    """``scale · B A``: A ``[r, in]`` and B ``[out, r]``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def is_lora(layer: nn.Module) -> bool:
    """Whether it is peft's LoRA around a linear layer or a router."""
    name = type(layer).__module__, type(layer).__name__
    return name in LINEAR or (name == ROUTER and layer.__dict__.get("parameter_name") == "weight")


def base_of(layer: nn.Module) -> nn.Module:
    """The layer itself, of one with LoRA around it."""
    return layer.base_layer if is_lora(layer) else layer


def unsupported_reason(layer: nn.Module) -> str | None:
    """Why two matrices are not all that a layer's adapter is; ``None`` if they are, or it has none to add."""
    if not is_lora(layer):
        return None
    if is_hooked(layer):
        return f"cannot call the hooks of a {type(layer).__name__}"
    names = _names(layer)
    if len(names) > 1 or (layer.merged and layer.disable_adapters):  # which the call would take out of the weight
        return REASON
    return None if not names or _is_plain(layer, names[0]) else REASON


def pair_of(layer: nn.Module) -> LoraPair | None:
    """What is added to a layer that `unsupported_reason` has nothing against; ``None``: nothing."""
    names = _names(layer) if is_lora(layer) else []
    if not names:
        return None
    return LoraPair(layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, float(layer.scaling[names[0]]))


def add_to(weight: Matrix, layer: nn.Module) -> Adapter | None:
    """Have a layer's weight lead to what its adapter adds. Returns what has to live as long."""
    pair = pair_of(layer)
    if pair is None:
        return None
    adapter = Adapter.of(*pair)
    weight.adapter = ctypes.addressof(adapter)
    return adapter


def state(layer: nn.Module) -> tuple:
    """What peft changes of a layer without giving it another tensor or module."""
    own = layer.__dict__
    changes = own["_disable_adapters"], len(own["merged_adapters"]), own["training"]
    return (*changes, *layer.active_adapters, *own["scaling"].values())


def _names(layer: nn.Module) -> list[str]:
    """The active adapters that it has matrices of, and adds."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: nn.Module, name: str) -> bool:
    """Whether an adapter is two matrices and no more."""
    parts, dropout = (layer.lora_A[name], layer.lora_B[name]), layer.lora_dropout[name]
    if name in layer.lora_variant or layer.fan_in_fan_out or (dropout.training and getattr(dropout, "p", 0)):
        return False
    if is_hooked(dropout) or any(is_hooked(part) or type(part) is not nn.Linear for part in parts):
        return False
    weights = [part.weight for part in parts]
    return all(part.bias is None for part in parts) and all(
        type(weight) in PLAIN and weight.dtype in DTYPES and weight.is_contiguous() for weight in weights
    )
