"""Adapters of peft on these models: what FP8 weights cannot take is refused, and no tensor of an adapter is dropped.

peft tells a model of its first adapter by setting ``peft_config`` once the layers are in place. Configs of further ones are put
into that dict before anything is changed, and then peft walks the model by ``named_modules``.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

from modeling_deepseek_moe.bitsandbytes_packing import is_packed, keep_readable
from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.layers import DeepseekMLP
from modeling_deepseek_moe.ops.experts import STACKS
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.terminal import shown

logger = logging.get_logger(__name__)
WAY_OUT = (
    "load the model with FineGrainedFP8Config(dequantize=True), convert it with `deepseek-moe convert fp8-to-bf16`, or "
    "name layers of attention alone"
)
MERGE = "`deepseek-moe convert merge-adapter` adds adapters to the files, FP8 ones too"
# peft writes no adapter's name, and knows none in the keys of layers that it did not wrap.
LORA_KEY = re.compile(
    r"^(.*)\.(gate_proj|up_proj|down_proj)\.(lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.((?!weight$)[^.]+))?(?:\.weight)?$"
)
EXPERT_KEY = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+_proj)\.lora_A\.")
STACK_KEY = re.compile(r"\.experts\.(?:base_layer\.)*lora_[AB]\.[^.]+\.weight$")
PEFT_PREFIX = "base_model.model."
ADAPTER_NAME = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")
# Methods that work on what goes into or comes out of a layer, or on its dequantised weight; others compute with the codes.
FP8_METHODS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA")


class AdapterMixin(ModelMixin):
    """What the models say to peft. Mixed in before `PreTrainedModel`."""

    @property
    def peft_config(self) -> dict:
        """The adapters' configs by name; there is no such attribute while there are no adapters."""
        if "peft_config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no peft_config: it has no adapters")
        return self.__dict__["peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict) -> None:
        with ExitStack() as undo:
            if "peft_config" not in self.__dict__:
                undo.callback(_unwrap, self)
            for config in configs.values():
                _refuse_fp8(super().named_modules(), config)
            _refuse_packed(super().named_modules())
            undo.pop_all()
        if "_adapter_hook" not in self.__dict__:
            self.__dict__["_adapter_hook"] = self.register_load_state_dict_pre_hook(accept_projections)
        self.__dict__["peft_config"] = configs
        keep_readable(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("peft_config", None)

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`. Without a word to the model, peft walks by it before it adds or merges adapters.

        Raises:
            ValueError: a further adapter, whose config is already in ``peft_config``, wants what FP8 weights cannot take.
        """
        configs = self.__dict__.get("peft_config")
        if not configs:
            yield from super().named_modules(*args, **kwargs)
            return
        for adapter, config in list(configs.items()):
            with ExitStack() as undo:
                undo.callback(configs.pop, adapter)
                _refuse_fp8(super().named_modules(), config)
                undo.pop_all()
        for name, module in super().named_modules(*args, **kwargs):
            if isinstance(getattr(module, "base_layer", None), QuantizedLinear):
                module.merge = partial(refuse_merge, name)
            yield name, module

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """As transformers'; next to FP8 weights adapters are fp32. What is refused leaves the model as it was.

        Raises:
            ValueError: FP8 weights cannot take the adapter.
        """
        with self._or_as_it_was(adapter_name or "default"):
            super().add_adapter(adapter_config, adapter_name)
        keep_readable(self)

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """As transformers', for adapters with one entry per expert too. What is refused leaves the model as it was.

        Raises:
            ValueError: FP8 weights cannot take the adapter, or a tensor of it has no place in the model or in memory.
        """
        name = adapter_name or "default"
        with self._or_as_it_was(name), ExitStack() as loaded:
            self.__dict__["_adapter_to_load"] = name
            loaded.callback(self.__dict__.pop, "_adapter_to_load")
            info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
            _refuse_homeless(self, info.unexpected_keys)
            on_disk = [key for key, parameter in self.named_parameters() if parameter.is_meta and f".{name}." in key]
            if on_disk:
                raise ValueError(
                    f"{on_disk[0]}: found its layer offloaded to disk, wanted it in memory for an adapter: load the model "
                    f"with a device_map that has no 'disk'; {MERGE}"
                )
        return info

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        adapter = model.__dict__.get("_adapter_to_load")
        if adapter is not None:
            stored = list(state_dict or ()) + [name for file in checkpoint_files or () for name in _names(file)]
            names = [_own_name(model, name) for name in stored]
            _refuse_some_experts(model, names)
            rooms = _make_room(model, ((name, adapter, None) for name in names))
            expected_keys = sorted({*(expected_keys or ()), *rooms.values()})  # asked for before there was room
            # transformers puts in the adapter's name, and knows of no module of DoRA's below it
            magnitudes = WeightRenaming(rf"(lora_magnitude_vector\.{re.escape(adapter)})$", r"\1.weight")
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or ()), magnitudes])
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @contextmanager
    def _or_as_it_was(self, name: str) -> Iterator[None]:
        """What raises within has not added the adapter ``name``; that FP8 experts have no layers for it is said."""
        from peft.utils.error import NoMatchingPeftModuleError

        with ExitStack() as undo:
            undo.callback(_restorer(self, name))
            try:
                yield
            except NoMatchingPeftModuleError as error:
                for module_name, module in self.named_modules():
                    if isinstance(module, QuantizedExperts):
                        raise ValueError(
                            f"{module_name}: found FP8-resident routed experts, wanted bf16 or fp32 ones, or layers of "
                            f"attention among an adapter's targets ({error}): {WAY_OUT}"
                        ) from error
                raise
            undo.pop_all()


def _restorer(model: nn.Module, name: str):
    """A function that takes the adapter ``name`` away, unless it is there already."""
    from peft.functional import delete_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    had = dict(model.__dict__.get("peft_config", {}))
    was_loaded = model._hf_peft_config_loaded
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = [(layer, list(layer.active_adapters)) for layer in layers]

    def restore() -> None:
        if not had:
            _unwrap(model)
            del model.peft_config
        elif name not in had and name in model.peft_config:
            delete_adapter(model, adapter_name=name, prefix=f"{model.peft_config[name].peft_type.value.lower()}_")
            del model.peft_config[name]
        model._hf_peft_config_loaded = was_loaded
        for layer, names in active:
            layer.set_adapter(names)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)

    return restore


def _refuse_fp8(modules: Iterable[tuple[str, nn.Module]], config) -> None:
    """
    Raises:
        ValueError: the adapter reads or changes weights that are FP8 codes.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    parameters = sorted(getattr(config, "target_parameters", None) or ())
    copies = tuple(getattr(config, "modules_to_save", None) or ())
    method = config.peft_type.value
    if not parameters and not copies and method in FP8_METHODS:
        return
    for name, module in modules:
        name = re.sub(r"\.(base_layer|original_module)\b", "", name)
        if not isinstance(module, QuantizedLinear | QuantizedExperts):
            continue
        kept = "codes" if isinstance(module, QuantizedLinear) else "routed experts"
        found = [t for t in parameters if f".{name}.weight".endswith(f".{t}")]
        if isinstance(module, QuantizedExperts):
            found = [t for t in parameters if t.split(".")[-1] in STACKS]
        if found:
            raise ValueError(
                f"{name}: found FP8-resident {kept}, wanted bf16 or fp32 ones for an adapter of {', '.join(found)} (as "
                f"peft reads gate_proj, up_proj, down_proj and all-linear): {WAY_OUT}"
            )
        parts = name.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if any(parent.endswith(copies) for parent in parents if copies):
            raise ValueError(
                f"{name}: found FP8-resident {kept}, wanted bf16 or fp32 ones for modules_to_save={list(copies)}, which "
                f"trains a copy: {WAY_OUT}"
            )
        if method not in FP8_METHODS and (
            config.target_modules == "all-linear" or check_target_module_exists(config, name)
        ):
            raise ValueError(
                f"{name}: found FP8-resident {kept}, wanted bf16 or fp32 ones for an adapter of peft_type={method}; on "
                f"FP8 there are {', '.join(FP8_METHODS)}: load the model with FineGrainedFP8Config(dequantize=True), or "
                "convert it with `deepseek-moe convert fp8-to-bf16`"
            )


def _refuse_homeless(model: nn.Module, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: tensors of an adapter that have no place in the model. Those of a layer that it was loaded without
            are named in a warning.
    """
    names, layers = set(names), len(model.base_model.layers)
    missing = re.compile(r"^(?:.*\.)?layers\.(\d+)\.")
    left_out = sorted(n for n in names if (match := missing.match(n)) and int(match[1]) >= layers)
    homeless = sorted(names - set(left_out))
    if homeless:
        raise ValueError(
            f"found {len(homeless)} tensors in the adapter that have no place in the model, wanted none: "
            f"{shown(', '.join(homeless[:3]), keep='')}{', ...' if homeless[3:] else ''}"
        )
    if left_out:
        logger.warning(
            f"The model has {layers} layers: left out {len(left_out)} tensors of the adapter, {shown(left_out[0], keep='')}"
        )


def _refuse_some_experts(model: nn.Module, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: of a layer's experts some have entries and others none, of which peft can make no stack.
    """
    counts = Counter((match[1], match[3]) for name in names if (match := EXPERT_KEY.match(name)))
    for (path, projection), count in counts.items():
        if count != model.config.n_routed_experts:
            raise ValueError(
                f"{path}.*.{projection}: found an adapter of {count} experts, wanted {model.config.n_routed_experts} as "
                f"in the model: {MERGE}, and experts one by one"
            )


def _refuse_packed(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """
    Raises:
        ValueError: DoRA has measured weights that bitsandbytes packed when the model was used.
    """
    for name, module in modules:
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


def refuse_merge(name: str, *args, **kwargs) -> None:
    """
    Raises:
        ValueError: always; takes the place of ``merge`` of an adapter on FP8 codes.
    """
    raise ValueError(
        f"{name}: found FP8 codes, wanted bf16 or fp32 to merge an adapter into: load the model with "
        f"FineGrainedFP8Config(dequantize=True); {MERGE}"
    )


def accept_projections(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A `load_state_dict` pre-hook: adapters of dense and shared MLPs get their layers.

    Of an adapter with one entry per expert peft puts gate, up and down on the routed experts alone; here its matrices for
    the other MLPs would find no layer and be dropped. The same hook refuses what is for FP8 experts.

    Raises:
        ValueError: an adapter of FP8-resident routed experts, or of experts in another number or rank; a tensor that has
            no place in the model.
    """
    # peft names the adapter in the keys of layers that it knows: one adapter a call
    named = next((match[1] for key in state_dict if (match := ADAPTER_NAME.search(key))), None)
    adapter = named or next(reversed(model.peft_config))
    entries = [(key.removeprefix(prefix), key) for key in state_dict if key.startswith(prefix)]
    parameters = dict(model.named_parameters())
    for name, key in entries:
        if STACK_KEY.search(name) and name in parameters and parameters[name].shape != state_dict[key].shape:
            raise ValueError(
                f"{name}: found {list(state_dict[key].shape)}, wanted {list(parameters[name].shape)} for all experts. Of an "
                f"adapter with one entry per expert some may lack theirs: {MERGE}, and experts one by one"
            )
    rooms = _make_room(model, ((name, adapter, state_dict[key].dtype) for name, key in entries))
    for name, key in entries:
        if name in rooms:
            state_dict[prefix + rooms[name]] = state_dict.pop(key)
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    _refuse_homeless(model, (name for name, _ in entries if ".lora_" in name and rooms.get(name, name) not in known))


def _make_room(model: nn.Module, entries: Iterable[tuple[str, str, torch.dtype | None]]) -> dict[str, str]:
    """Put an adapter's layers on projections of dense and shared MLPs that it has tensors for.

    Args:
        entries: its tensors' names, its own where they lack it, and the dtype that the layer is to have.

    Returns:
        Where the tensors of those MLPs belong in the model's ``state_dict``, by their names.

    Raises:
        ValueError: a tensor for FP8-resident routed experts.
    """
    modules = dict(model.named_modules())
    experts = tuple(name + "." for name, module in modules.items() if isinstance(module, QuantizedExperts))
    rooms = {}
    for name, adapter, dtype in entries:
        if ".lora_" in name and experts and name.startswith(experts):
            raise ValueError(
                f"{name}: found an adapter of FP8-resident routed experts, wanted bf16 or fp32: {WAY_OUT}"
            )
        match = LORA_KEY.match(name)
        mlp = modules.get(match[1]) if match else None
        if not isinstance(mlp, DeepseekMLP):
            continue
        path, projection, half, own = match.groups()
        rooms[name] = f"{path}.{projection}.{half}.{own or adapter}.weight"
        if (own or adapter) not in getattr(getattr(mlp, projection), "lora_A", {}):
            _inject(mlp, projection, own or adapter, _config_for(model.peft_config[own or adapter], path, projection))
        if dtype is not None:
            getattr(getattr(mlp, projection), half)[own or adapter].to(dtype)
    return rooms


def _config_for(config, path: str, projection: str):
    """The adapter's config as it is for one projection of one MLP."""
    from peft.utils.other import get_pattern_key

    one = copy.copy(config)
    for values, field in ((config.rank_pattern, "r"), (config.alpha_pattern, "lora_alpha")):
        key = get_pattern_key(values.keys(), f"{path}.{projection}")
        setattr(one, field, values.get(key, getattr(config, field)))
    one.rank_pattern, one.alpha_pattern = {}, {}
    one.target_modules, one.target_parameters = {projection}, None
    one.modules_to_save, one.exclude_modules = None, None
    one.layers_to_transform = one.layers_pattern = None
    return one


def _inject(mlp: DeepseekMLP, projection: str, adapter: str, config) -> None:
    """A LoRA layer, by peft, on one projection of one MLP."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, mlp, adapter)
    del mlp.peft_config  # the model's is the one that counts


def _own_name(model: nn.Module, name: str) -> str:
    """The name within ``model`` of an adapter's tensor, which a model with or without a head may have been trained for."""
    name, inner = name.removeprefix(PEFT_PREFIX), model.base_model_prefix + "."
    if model.base_model is model:
        return name.removeprefix(inner)
    first = name.split(".")[0]
    return inner + name if hasattr(model.base_model, first) and not hasattr(model, first) else name


def _names(file: str) -> list[str]:
    """Of the tensors in an adapter's file."""
    if str(file).endswith(".safetensors"):
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    return list(torch.load(file, map_location="meta", weights_only=True))
