"""Adapters of peft on these models: what FP8 weights cannot take is refused, and no tensor of an adapter is dropped.

peft tells a model of its adapters by setting ``peft_config`` once its layers are in place, by every door
(``get_peft_model``, ``PeftModel.from_pretrained``, ``add_adapter``, ``load_adapter``): that is where this looks.
"""

import copy
import re
from functools import partial

import torch
from torch import nn

from modeling_deepseek_moe.adapter_dtypes import widen_adapters
from modeling_deepseek_moe.four_bit import is_packed, keep_readable
from modeling_deepseek_moe.fp8 import Fp8Linear
from modeling_deepseek_moe.fp8_experts import Fp8Experts
from modeling_deepseek_moe.layers import DeepseekMLP
from modeling_deepseek_moe.ops.experts import STACKS

WAY_OUT = "load the model with FineGrainedFP8Config(dequantize=True)"
MERGE = "`deepseek-moe convert merge-adapter` adds adapters to the files, FP8 ones too"
LORA_KEY = re.compile(r"^(.*)\.(gate_proj|up_proj|down_proj)\.(lora_[AB])(?:\.([^.]+))?\.weight$")
ADAPTER_NAME = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")


class AdapterMixin:
    """What the models say to peft. Mixed in before `PreTrainedModel`."""

    @property
    def peft_config(self) -> dict:
        """The adapters' configs by name; there is no such attribute while there are no adapters."""
        if "peft_config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no peft_config: it has no adapters")
        return self.__dict__["peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict) -> None:
        is_first = "peft_config" not in self.__dict__
        try:
            for config in configs.values():
                _refuse_fp8(self, config)
            _refuse_packed(self)
        except ValueError:
            if is_first:
                _unwrap(self)
            raise
        if "_adapter_hook" not in self.__dict__:
            self.__dict__["_adapter_hook"] = self.register_load_state_dict_pre_hook(accept_projections)
        self.__dict__["peft_config"] = configs
        _settle(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("peft_config", None)

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """As transformers'; beside FP8 weights adapters are fp32.

        Raises:
            ValueError: an adapter of FP8-resident routed experts.
        """
        # peft sets ``peft_config`` for the first adapter alone, and warns of one that finds nothing to change
        _refuse_fp8(self, adapter_config)
        super().add_adapter(adapter_config, adapter_name)
        _settle(self)


def _refuse_fp8(model: nn.Module, config) -> None:
    """
    Raises:
        ValueError: the adapter reads or changes weights that are FP8 codes.
    """
    for name, module in model.named_modules():
        if isinstance(module, Fp8Experts):
            stacks = sorted(t for t in getattr(config, "target_parameters", None) or () if t.split(".")[-1] in STACKS)
            if stacks:
                raise ValueError(
                    f"{name}: found FP8-resident routed experts, wanted bf16 or fp32 ones for an adapter of "
                    f"{', '.join(stacks)} (as peft reads gate_proj, up_proj, down_proj and all-linear): {WAY_OUT}"
                )
        elif isinstance(getattr(module, "base_layer", None), Fp8Linear) and hasattr(module, "parameter_name"):
            raise ValueError(
                f"{name}: found FP8 codes, wanted bf16 or fp32 for an adapter of target_parameters: name the "
                f"layer in target_modules, or {WAY_OUT}"
            )


def _refuse_packed(model: nn.Module) -> None:
    """
    Raises:
        ValueError: DoRA has measured weights that bitsandbytes packed when the model was used.
    """
    for name, module in model.named_modules():
        if getattr(module, "lora_magnitude_vector", None) and is_packed(module.base_layer):
            raise ValueError(
                f"{name}: found 4-bit codes that bitsandbytes packed when the model was used, wanted them as loaded, since "
                "DoRA reads them: call model.train() before the adapter is made"
            )


def _unwrap(model: nn.Module) -> None:
    """The model as it was before peft's layers were put in."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            while hasattr(child, "base_layer"):
                child = child.base_layer
            setattr(parent, child_name, getattr(child, "original_module", child))


def _settle(model: nn.Module) -> None:
    """peft gives an adapter its layer's dtype, and merges by adding to the weight: neither is for FP8 or packed codes."""
    keep_readable(model)
    widen_adapters(model, new_values=True)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), Fp8Linear):
            module.merge = partial(refuse_merge, name)


def refuse_merge(name: str, *args, **kwargs) -> None:
    """
    Raises:
        ValueError: always; takes the place of ``merge`` of an adapter on FP8 codes.
    """
    raise ValueError(f"{name}: found FP8 codes, wanted bf16 or fp32 to merge an adapter into: {WAY_OUT}; {MERGE}")


def accept_projections(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A `load_state_dict` pre-hook: adapters of dense and shared MLPs get their layers.

    Of an adapter with one entry per expert peft puts gate, up and down on the routed experts alone; here its matrices for
    the other MLPs would find no layer and be dropped. The same hook refuses what is for FP8 experts.

    Raises:
        ValueError: an adapter of FP8-resident routed experts.
    """
    mlps = {prefix + name: module for name, module in model.named_modules() if isinstance(module, DeepseekMLP)}
    experts = tuple(prefix + n + "." for n, module in model.named_modules() if isinstance(module, Fp8Experts))
    # peft names the adapter in the keys of layers that it knows: one adapter a call
    named = next((match[1] for key in state_dict if (match := ADAPTER_NAME.search(key))), None)
    wanted: dict[tuple[str, str], dict[str, torch.dtype]] = {}
    for key, tensor in list(state_dict.items()):
        if ".lora_" in key and experts and key.startswith(experts):
            raise ValueError(f"{key}: found an adapter of FP8-resident routed experts, wanted bf16 or fp32: {WAY_OUT}")
        match = LORA_KEY.match(key)
        if match is None or match[1] not in mlps:
            continue
        name, projection, half, adapter = match.groups()
        if adapter is None:
            adapter = named or next(reversed(model.peft_config))
            state_dict[f"{name}.{projection}.{half}.{adapter}.weight"] = state_dict.pop(key)
        if adapter not in getattr(getattr(mlps[name], projection), "lora_A", {}):
            wanted.setdefault((name, adapter), {})[projection] = tensor.dtype
    for (name, adapter), projections in wanted.items():
        _inject(mlps[name], adapter, model.peft_config[adapter], projections)
    if wanted:
        _settle(model)


def _inject(mlp: DeepseekMLP, adapter: str, config, projections: dict[str, torch.dtype]) -> None:
    """LoRA layers as ``config`` has them, by peft, on some projections of one MLP."""
    from peft import inject_adapter_in_model

    config = copy.copy(config)
    config.target_modules, config.target_parameters = set(projections), None
    config.modules_to_save, config.exclude_modules = None, None
    config.layers_to_transform = config.layers_pattern = None
    inject_adapter_in_model(config, mlp, adapter)
    del mlp.peft_config  # the model's is the one that counts
    for projection, dtype in projections.items():
        layer = getattr(mlp, projection)
        layer.lora_A[adapter].to(dtype)
        layer.lora_B[adapter].to(dtype)
