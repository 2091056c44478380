"""peft's tuners of these models: all layers are looked at before the first is merged.

peft merges layer by layer, and a layer that cannot be merged would leave those before it merged. Importing this file imports peft.
"""

import re
import types
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from modeling_deepseek_moe.adapters.divided import check_whole
from modeling_deepseek_moe.bnb.packing import is_quantized_by_bitsandbytes
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear


class LooksFirst(BaseTuner):
    """A tuner of a class of peft's, ``peft_class``, which is its other base. So are copies and pickles of it."""

    peft_class: type[BaseTuner]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_merge(self.model, adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        check_merge(self.model, adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def __reduce__(self):
        return _empty, (type(self).peft_class,), self.__dict__


def _empty(kind) -> BaseTuner:
    made = kind.__new__(kind)
    look_first(made)
    return made


@cache
def _looking(kind) -> type:
    return types.new_class(kind.__name__, (LooksFirst, kind), exec_body=lambda body: body.update(peft_class=kind))


def look_first(tuner: BaseTuner) -> None:
    """Make a tuner one that `LooksFirst`."""
    kind: Any = type(tuner)
    if not issubclass(kind, LooksFirst):
        tuner.__class__ = _looking(kind)


def check_merge(model: nn.Module, adapter_names: list[str] | None, safe: bool) -> None:
    """
    Args:
        adapter_names: of those that are to be merged; ``None``: the active ones.
        safe: whether floating-point weights are not to become NaN either; codes cannot.

    Raises:
        ValueError: there is a layer that they cannot be merged into. Nothing was merged.
    """
    check_whole(model)
    for path, layer in nn.Module.named_modules(model):
        if not isinstance(layer, BaseTunerLayer):
            continue
        wanted = layer.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name not in layer.merged_adapters and _has(layer, name)]
        if not names:
            continue
        name, base = re.sub(r"\.base_layer\b", "", path), layer.get_base_layer()
        is_codes = isinstance(base, QuantizedLinear | QuantizedExperts)
        biased = [own for own in names if getattr(layer, "lora_bias", {}).get(own)]
        if biased and getattr(base, "bias", None) is None:
            raise ValueError(
                f"{name}: adapter {biased[0]}: found lora_bias=True on a layer without a bias, wanted one to merge it into: keep the adapter apart"
            )
        if type(layer).merge is BaseTunerLayer.merge and is_quantized_by_bitsandbytes(base):
            raise ValueError(
                f"{name}: found peft's {type(layer).__name__} to merge, which has no merge, wanted a layer that is not quantised: "
                "before there is an adapter, call model.dequantize(); or keep the adapter apart"
            )
        if hasattr(layer, "check_merge"):
            layer.check_merge(names)
        elif is_codes:
            methods = {model.peft_config[own].peft_type.value for own in names}
            raise ValueError(
                f"{name}: found {base.weight_format.title}-resident codes to merge an adapter of peft_type={', '.join(methods)} into, wanted "
                f"bf16 or fp32 weights; into codes LoRA is merged: before there is an adapter, {base.weight_format.to_floats}"
            )
        if is_codes or safe:
            _check_finite(name, layer, names)


def _has(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, part, ()) for part in layer.adapter_layer_names)


def _check_finite(name: str, layer: BaseTunerLayer, adapters: list[str]) -> None:
    for own, parameter in layer.named_parameters():
        found = [adapter for adapter in adapters if adapter in own.split(".")]
        # peft brings the values of an offloaded layer as it merges it
        if found and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: adapter {found[0]}: found NaN or Inf in {own}, wanted finite values to merge")
