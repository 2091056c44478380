"""Merging into linear layers whose weight is codes, by every method of peft's: its own sum, of the decoded weight, gets codes.

peft's layers write what they merge to the base layer's ``weight``, which on codes would end in an error at best. So they
are shown a layer of floating-point weights meanwhile. What has no way into codes of bitsandbytes is refused. Importing this
file imports peft.
"""

from contextlib import ExitStack

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from modeling_deepseek_moe.adapters.classes import put_in_front
from modeling_deepseek_moe.adapters.merging import Merge, add_to_codes, write_over
from modeling_deepseek_moe.bnb.packing import is_foreign
from modeling_deepseek_moe.quantized.linear import QuantizedLinear


class OnCodes(nn.Module, BaseTunerLayer):
    """In front of a class of peft's: what merging writes are codes, and unmerging gives back the bytes that were there."""

    merge_record: Merge
    _kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None  # codes, scales and bias

    def check_merge(self, names: list[str]) -> None:
        """
        Raises:
            ValueError: adapters of these names cannot be merged into codes.
        """
        if not isinstance(self.base_layer, QuantizedLinear):
            raise ValueError(
                f"adapter {', '.join(names)}: found a layer of {type(self).__module__} around one of {type(self.base_layer).__module__} to "
                "merge into codes, wanted adapters of one method: take the others off before"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, QuantizedLinear):
            # the decoded layer, which peft takes adapters out of and puts them in again to merge DoRA
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if has_adapter(self, name)]
        if not names:
            return
        self.check_merge(names)
        decoded = _decoded(base)
        with ExitStack() as undo:
            undo.callback(setattr, self, "merged_adapters", list(self.merged_adapters))
            with ExitStack() as shown:
                shown.callback(setattr, self, "base_layer", base)
                self.base_layer = decoded
                super().merge(safe_merge, names)
            codes, scales, bias = base.weight.data, base.scale.data, base.bias
            difference = decoded.weight.data.sub_(base.dequantize())
            new = add_to_codes(base.weight_format, codes, scales, difference, self.merge_record)
            undo.pop_all()
        if self._kept is None:
            self._kept = codes, scales, None if bias is None else bias.data.clone()
        base.weight.data, base.scale.data = new
        if bias is not None:
            bias.data.copy_(decoded.bias)

    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not isinstance(base, QuantizedLinear):
            super().unmerge()
            return
        if self._kept is not None:
            codes, scales, bias = self._kept
            write_over(base.weight.data, base.scale.data, (codes, scales))
            if bias is not None:
                base.bias.data.copy_(bias)
            self._kept = None
        self.merged_adapters.clear()


class OnForeignCodes(nn.Module, BaseTunerLayer):
    """In front of a class of peft's that knows nothing of a layer of bitsandbytes below it, unless its backend does."""

    def check_merge(self, names: list[str]) -> None:
        """
        Raises:
            ValueError: peft cannot merge adapters of these names, or would write sums to codes as if they were weights.
        """
        if self.quantization_backend is None:
            base = self.get_base_layer()
            raise ValueError(
                f"adapter {', '.join(names)}: found the codes of bitsandbytes' {type(base).__name__} to merge by {type(self).__module__}, which has "
                "no way into them, wanted weights in bf16 or fp32, or LoRA: before there is an adapter, call model.dequantize()"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if has_adapter(self, name)]
        if names:
            self.check_merge(names)
            super().merge(safe_merge, names)


def look_below(layer: BaseTunerLayer, base: nn.Module) -> None:
    """Make a layer of peft's that is given a base layer one that merges as codes of this package's below it want."""
    while hasattr(base, "base_layer"):
        base = base.base_layer
    if isinstance(base, QuantizedLinear):
        put_in_front(layer, OnCodes)
        layer.__dict__.setdefault("merge_record", Merge())


def look_below_foreign(module: nn.Module) -> None:
    """The same of a module of one of this package's models, where the codes are bitsandbytes'."""
    kind = type(module)
    if not isinstance(module, BaseTunerLayer) or "base_layer" not in module._modules:
        return
    is_blind = kind.merge is BaseTunerLayer.merge or not kind.__module__.endswith(".bnb")
    if is_blind and is_foreign(module.get_base_layer()):
        put_in_front(module, OnForeignCodes)


def has_adapter(layer: BaseTunerLayer, name: str) -> bool:
    """Whether a layer of peft's has parameters of an adapter."""
    return any(name in getattr(layer, part, ()) for part in layer.adapter_layer_names)


def _decoded(base: QuantizedLinear) -> nn.Linear:
    with torch.device("meta"):
        decoded = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    decoded.weight = nn.Parameter(base.dequantize(), requires_grad=False)
    if base.bias is not None:
        decoded.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return decoded
