"""peft's tuners of these models: all layers are looked at before the first is merged.

peft merges layer by layer, and a layer that cannot be merged would leave those before it merged. Importing this file imports peft.
"""

import re
from contextlib import AbstractContextManager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from modeling_deepseek_moe.adapters.codes import has_adapter
from modeling_deepseek_moe.adapters.divided import check_whole
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear


class LooksFirst(BaseTuner):
    """In front of a class of peft's: a tuner that looks at what it is asked for before it merges or runs."""

    def _enable_peft_forward_hooks(self, *args, **kwargs) -> AbstractContextManager:
        """What peft calls before the model is; methods without it have no use for ``adapter_names``, which peft drops then.

        Raises:
            ValueError: a batch has them, and all its sequences would have the active adapter.
        """
        of_peft = getattr(super(), "_enable_peft_forward_hooks", None)
        if of_peft is not None:
            return of_peft(*args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            methods = ", ".join(sorted({config.peft_type.value for config in self.peft_config.values()}))
            raise ValueError(
                f"adapter_names: found adapters of peft_type={methods}, for which peft has no batches of several, wanted LoRA; or "
                "set_adapter before a batch of each"
            )
        return nullcontext()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_merge(self.model, adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        check_merge(self.model, adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)


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
        names = [name for name in wanted if name not in layer.merged_adapters and has_adapter(layer, name)]
        if not names:
            continue
        name, base = re.sub(r"\.base_layer\b", "", path), layer.get_base_layer()
        is_codes = isinstance(base, QuantizedLinear | QuantizedExperts)
        if hasattr(layer, "check_merge"):
            layer.check_merge(names)
        _check_bias(name, layer, names)
        if is_codes or safe:
            _check_finite(name, layer, names)


def _check_bias(name: str, layer: BaseTunerLayer, adapters: list[str]) -> None:
    biased = [adapter for adapter in adapters if getattr(layer, "lora_bias", {}).get(adapter)]
    if biased and getattr(layer.get_base_layer(), "bias", None) is None:
        raise ValueError(
            f"{name}: adapter {biased[0]}: found lora_bias=True and no bias in the layer, wanted one to merge it into, or an adapter without"
        )


def _check_finite(name: str, layer: BaseTunerLayer, adapters: list[str]) -> None:
    for own, parameter in layer.named_parameters():
        found = [adapter for adapter in adapters if adapter in own.split(".")]
        # peft brings the values of an offloaded layer as it merges it
        if found and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: adapter {found[0]}: found NaN or Inf in {own}, wanted finite values to merge")
