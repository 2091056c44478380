"""Where peft meets a model.

peft tells a model nothing of an adapter before its layers are in place. But it walks the model by ``named_modules`` first, and
by then the config is in the dict of the tuner that holds the model: so it is read there, checked, and given the layers that peft
lacks, before anything is changed. Which tuner holds a model torch tells whoever registers for it.
"""

import copy
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.core_model_loading import WeightRenaming

from modeling_deepseek_moe.adapters.classes import put_in_front
from modeling_deepseek_moe.adapters.divided import check_divided, tell_width
from modeling_deepseek_moe.adapters.merging import Merge
from modeling_deepseek_moe.adapters.refusals import check_config, check_packed
from modeling_deepseek_moe.adapters.stored import (
    MERGE,
    accept_projections,
    loaded_adapter,
    make_room,
    names_in,
    own_name,
    refuse_homeless,
    refuse_some_experts,
    refuse_unfit,
)
from modeling_deepseek_moe.adapters.targets import Targets, has_stacks, injected, plain_names
from modeling_deepseek_moe.bnb.packing import keep_children_readable, keep_readable
from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.quantized.experts import QuantizedExperts

ALIGNMENT = 64  # bytes, of what torch allocates
READ = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")  # what reading a config changes
SLOT = "_adapters"  # where a model carries what it knows of its adapters


class _Known:
    """What a model knows of its adapters besides their configs. Copies and pickles of it are ``None``."""

    def __init__(self):
        self.tuner: weakref.ref | None = None
        self.targets: dict[str, Targets] = {}
        self.trained: set[str] = set()  # parameters that were, before the first adapter froze them
        self.merge = Merge()

    def __reduce__(self):
        return type(None), ()


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
            check_packed(nn.Module.named_modules(self))
            undo.pop_all()
        if "_adapter_hook" not in self.__dict__:
            self.__dict__["_adapter_hook"] = self.register_load_state_dict_pre_hook(_accept)
        self.__dict__["peft_config"] = configs
        keep_readable(self)
        for module in self.modules():
            if isinstance(module, KeepsDtype):
                module.narrow()

    @peft_config.deleter
    def peft_config(self) -> None:
        if self.__dict__.pop("peft_config", None) is not None:  # peft, once all adapters are merged or taken off
            _known(self).merge.report()
            self.__dict__[SLOT] = None

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`; what an adapter is about to do to the modules is looked at first.

        Raises:
            ValueError: the adapter wants what the model cannot give; peft has changed nothing yet.
        """
        configs = _configs(self)
        if not configs:
            yield from super().named_modules(*args, **kwargs)
            return
        from modeling_deepseek_moe.adapters.codes import look_below_foreign

        known = _known(self)
        is_new = _prepare(self, known, configs)
        merge = known.merge
        for name, module in super().named_modules(*args, **kwargs):
            if "merge_record" in module.__dict__:
                module.merge_record = merge
            tell_width(module)
            look_below_foreign(module)
            keep_children_readable(module)
            if is_new and isinstance(module, QuantizedExperts):
                with _shown(module):
                    yield name, module
            else:
                yield name, module
        merge.report()  # peft has merged on its way

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """As transformers'; on codes adapters are fp32. What is refused leaves the model as it was.

        Raises:
            ValueError: the model cannot take the adapter.
        """
        with self._or_as_it_was(adapter_name or "default"):
            super().add_adapter(adapter_config, adapter_name)
        keep_readable(self)

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """As transformers', for adapters with one entry per expert too. What is refused leaves the model as it was.

        Raises:
            ValueError: the model cannot take the adapter, or a tensor of it has no place in the model or in memory.
        """
        name = adapter_name or "default"
        with self._or_as_it_was(name), ExitStack() as loaded:
            self.__dict__["_adapter_to_load"] = name
            loaded.callback(self.__dict__.pop, "_adapter_to_load")
            info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
            refuse_homeless(self, info.unexpected_keys)
            own = [(key, parameter) for key, parameter in self.named_parameters() if f".{name}." in key]
            on_disk = [key for key, parameter in own if parameter.is_meta]
            if on_disk:
                raise ValueError(
                    f"{on_disk[0]}: found its layer offloaded to disk, wanted it in memory for an adapter: load the model "
                    f"with a device_map that has no 'disk'; {MERGE}"
                )
            for _, parameter in own:
                # mapped from the file, at any address, of which the bits of torch's products depend
                if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
                    parameter.data = parameter.data.clone()
        return info

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        adapter = model.__dict__.get("_adapter_to_load")
        if adapter is not None:
            stored = list(state_dict or ()) + [name for file in checkpoint_files or () for name in names_in(file)]
            names = [own_name(model, name) for name in stored]
            refuse_some_experts(model, names)
            rooms = make_room(model, ((name, adapter, None) for name in names))
            expected_keys = sorted({*(expected_keys or ()), *rooms.values()})  # asked for before there was room
            # transformers puts in the adapter's name, and knows of no module of DoRA's below it
            magnitudes = WeightRenaming(rf"(lora_magnitude_vector\.{re.escape(adapter)})$", r"\1.weight")
            given, mapping = load_config, [*(load_config.weight_mapping or ()), magnitudes]
            load_config = replace(given, weight_mapping=mapping, ignore_mismatched_sizes=True)
            found = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
            if not given.ignore_mismatched_sizes:
                refuse_unfit(", ".join(map(str, checkpoint_files or ())), found[0].mismatched_keys)
            return found
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @contextmanager
    def _or_as_it_was(self, name: str) -> Iterator[None]:
        """What raises within has not added the adapter ``name``."""
        with ExitStack() as undo:
            undo.callback(_restorer(self, name))
            yield
            undo.pop_all()


def _accept(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A `load_state_dict` pre-hook: peft is about to load an adapter's tensors.

    Raises:
        ValueError: one that does not fit. An adapter that peft has put in for them, to be used as it is, is taken off again.
    """
    adapter = loaded_adapter(model, state_dict)
    config, targets = model.peft_config[adapter], _known(model).targets.get(adapter)
    with ExitStack() as undo:
        if targets is not None and not targets.is_loaded and config.inference_mode:
            undo.callback(_take_off, model, adapter)
        accept_projections(model, adapter, state_dict, prefix)
        undo.pop_all()
    if targets is not None:
        targets.is_loaded = True


def _note_peft(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Called by torch when a module is put into another one.

    peft's tuners have the model that they change as ``model``, and its layers what they are around as ``base_layer``.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    if isinstance(child, AdapterMixin) and isinstance(parent, tuners.BaseTuner):
        from modeling_deepseek_moe.adapters.tuners import LooksFirst

        put_in_front(parent, LooksFirst)
        _known(child).tuner = weakref.ref(parent)
    elif name == "base_layer" and isinstance(parent, tuners.BaseTunerLayer):
        from modeling_deepseek_moe.adapters.codes import look_below

        look_below(parent, child)


register_module_module_registration_hook(_note_peft)


def _known(model: nn.Module) -> _Known:
    known = model.__dict__.get(SLOT)
    if known is None:
        known = model.__dict__[SLOT] = _Known()
    return known


def _configs(model: nn.Module) -> dict:
    """The configs of a model's adapters, also of those that peft is about to make."""
    known = model.__dict__.get(SLOT)
    tuner = None if known is None or known.tuner is None else known.tuner()
    configs = None if tuner is None else tuner.__dict__.get("peft_config")
    return model.__dict__.get("peft_config") or configs or {}


def _prepare(model: nn.Module, known: _Known, configs: dict) -> bool:
    """Look at configs that are new. Whether there are any whose layers of experts are not in place yet."""
    modules = None
    for adapter in known.targets.keys() - configs.keys():
        del known.targets[adapter]
    for adapter, config in list(configs.items()):
        found = known.targets.get(adapter)
        if found is not None and found.config is config:
            found.give_back()
            continue
        modules = plain_names(model) if modules is None else modules
        if not known.targets:
            known.trained = {name for name, parameter in _parameters(modules) if parameter.requires_grad}
        with ExitStack() as undo:
            undo.callback(configs.pop, adapter)
            known.targets[adapter] = _targets(model, modules, config)
            undo.pop_all()
    new = [name for name, targets in known.targets.items() if not targets.is_done]
    if new:
        made = set(injected(model))
        for name in new:
            known.targets[name].is_done = name in made
    return any(not known.targets[name].is_done and has_stacks(configs[name]) for name in new)


def _targets(model: nn.Module, modules: dict[str, nn.Module], config) -> Targets:
    """Of a config that is new; one of LoRA gets the layers that peft has none for."""
    if config.peft_type.value != "LORA":
        targets = Targets(config)
        check_config(modules, targets)
        check_divided(model, modules, targets)
        return targets
    from modeling_deepseek_moe.adapters.layers import CUSTOM

    before = {name: copy.copy(getattr(config, name)) for name in READ}
    with ExitStack() as undo:
        undo.callback(vars(config).update, before)
        targets = Targets.of(model, modules, config)
        check_config(modules, targets)
        check_divided(model, modules, targets)
        undo.pop_all()
    config._register_custom_module(CUSTOM)  # peft's own name for it; it has no other
    targets.say()
    return targets


@contextmanager
def _shown(experts: QuantizedExperts) -> Iterator[None]:
    """Within, peft finds parameters for the stacks of experts that have none."""
    experts.shows_stacks = True
    try:
        yield
    finally:
        experts.shows_stacks = False


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


def _take_off(model: nn.Module, name: str) -> None:
    """An adapter whose tensors were not loaded; the only one leaves the model as it was without."""
    from peft.functional import delete_adapter

    if len(model.peft_config) > 1:
        delete_adapter(model, adapter_name=name, prefix=f"{model.peft_config[name].peft_type.value.lower()}_")
        del model.peft_config[name]
        return
    trained = _known(model).trained
    _unwrap(model)
    del model.peft_config
    for own, parameter in _parameters(plain_names(model)):
        if parameter.is_floating_point():
            parameter.requires_grad_(own in trained)


def _parameters(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in modules.items():
        yield from (
            (f"{name}.{own}", parameter) for own, parameter in module._parameters.items() if parameter is not None
        )


def _unwrap(model: nn.Module) -> None:
    """The model as it was before peft's layers were put in."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            while hasattr(child, "base_layer"):
                child = child.base_layer
            setattr(parent, child_name, getattr(child, "original_module", child))
