"""How an adapter's tensors find their layers: none is dropped, and what has no place is said.

Adapters with one entry per expert, of transformers 4, have entries for the dense and shared MLPs too, of which peft makes no layers:
they are made here, for the tensors that there are.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from modeling_deepseek_moe.layers import DeepseekMLP
from modeling_deepseek_moe.terminal import shown

logger = logging.get_logger(__name__)
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


def refuse_homeless(model: nn.Module, names: Iterable[str]) -> None:
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


def refuse_some_experts(model: nn.Module, names: Iterable[str]) -> None:
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


def refuse_unfit(source: str, unfit: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    """
    Args:
        source: the adapter's file, or its name.
        unfit: tensors' names, with the shapes that they have and would have to have.

    Raises:
        ValueError: there are any.
    """
    unfit = sorted(unfit)
    if not unfit:
        return
    name, found, wanted = unfit[0]
    others = f", and {len(unfit) - 1} tensors more" if unfit[1:] else ""
    of_all, one_by_one = "", ""
    if STACK_KEY.search(name):
        of_all = " for all experts"
        one_by_one = f"; of one with entries for some experts alone, {MERGE}, and experts one by one"
    raise ValueError(
        f"{shown(source, keep='')}: tensor {shown(name, keep='')}: found {list(found)}, wanted {list(wanted)}{of_all}{others}: "
        f"an adapter of a model of other shapes, or of another rank than its config tells{one_by_one}"
    )


def loaded_adapter(model: nn.Module, state_dict: dict) -> str:
    """Which of a model's adapters a state dict is of: peft names it in the keys of layers that it knows, one a call."""
    named = next((match[1] for key in state_dict if (match := ADAPTER_NAME.search(key))), None)
    return named or next(reversed(model.peft_config))


def accept_projections(model: nn.Module, adapter: str, state_dict: dict, prefix: str) -> None:
    """Adapters of dense and shared MLPs get their layers before a state dict is loaded.

    Of an adapter with one entry per expert peft puts gate, up and down on the routed experts alone; here its matrices for
    the other MLPs would find no layer and be dropped.

    Raises:
        ValueError: an adapter of experts in another number, rank or size; a tensor that has no place in the model.
    """
    entries = [(key.removeprefix(prefix), key) for key in state_dict if key.startswith(prefix)]
    rooms = make_room(model, ((name, adapter, state_dict[key].dtype) for name, key in entries))
    for name, key in entries:
        if name in rooms:
            state_dict[prefix + rooms[name]] = state_dict.pop(key)
    parameters, own = dict(model.named_parameters()), re.compile(rf"\.{re.escape(adapter)}(\.|$)")
    stored = {rooms.get(name, name): state_dict[prefix + rooms.get(name, name)].shape for name, _ in entries}
    refuse_unfit(
        f"adapter {adapter}",
        (
            (name, shape, parameters[name].shape)
            for name, shape in stored.items()
            if own.search(name) and name in parameters and parameters[name].shape != shape
        ),
    )
    known = {*parameters, *(name for name, _ in model.named_buffers())}
    refuse_homeless(model, (name for name, _ in entries if ".lora_" in name and rooms.get(name, name) not in known))


def make_room(model: nn.Module, entries: Iterable[tuple[str, str, torch.dtype | None]]) -> dict[str, str]:
    """Put an adapter's layers on projections of dense and shared MLPs that it has tensors for.

    Args:
        entries: its tensors' names, its own where they lack it, and the dtype that the layer is to have.

    Returns:
        Where the tensors of those MLPs belong in the model's ``state_dict``, by their names.
    """
    modules = dict(model.named_modules())
    rooms = {}
    for name, adapter, dtype in entries:
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


def own_name(model: nn.Module, name: str) -> str:
    """The name within ``model`` of an adapter's tensor, which a model with or without a head may have been trained for."""
    name, inner = name.removeprefix(PEFT_PREFIX), model.base_model_prefix + "."
    if model.base_model is model:
        return name.removeprefix(inner)
    first = name.split(".")[0]
    return inner + name if hasattr(model.base_model, first) and not hasattr(model, first) else name


def names_in(file: str) -> list[str]:
    """Of the tensors in an adapter's file."""
    if str(file).endswith(".safetensors"):
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    return list(torch.load(file, map_location="meta", weights_only=True))
