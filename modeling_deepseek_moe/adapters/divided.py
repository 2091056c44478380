"""Adapters of a model that ranks divide: what peft 0.21 runs as on one process, and the refusal of the rest."""

import re

from torch import nn
from transformers.distributed.utils import is_dtensor

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.adapters.refusals import variants
from modeling_deepseek_moe.adapters.targets import Targets, suffix

# Rules of tensor parallelism that its layers follow. Under 'replicate' each rank has all of a layer, and of its gradients.
LORA_RULES = ("colwise", "rowwise", "replicate", "embedding_rowwise")


def check_divided(model: nn.Module, modules: dict[str, nn.Module], targets: Targets) -> None:
    """
    Raises:
        ValueError: ranks divide what the adapter is for, in a way that peft 0.21 has no layers for.
    """
    asked = _division(model)
    if asked is None:
        return
    if asked.fsdp_size > 1 and (asked.dp_replicate_size > 1 or asked.tp_size > 1):
        raise ValueError(
            f"fsdp_size={asked.fsdp_size}, dp_replicate_size={asked.dp_replicate_size}, tp_size={asked.tp_size}: found an "
            "adapter, which peft would make in the shape of a rank's part, wanted fsdp_size or tp_size alone, or DDP"
        )
    sizes = f"tp_size={asked.tp_size}, ep_size={asked.ep_size}"
    if targets.reaches_experts and max(asked.tp_size, asked.ep_size) > 1:
        raise ValueError(
            f"{sizes}: found an adapter of routed experts, of which each rank has a part, wanted one without them, or ranks that "
            "have them whole: DDP, or fsdp_size alone"
        )
    if asked.tp_size == 1:
        return
    _check_tensor_parallel(sizes, model.tp_plan, modules, targets)


def check_whole(model: nn.Module) -> None:
    """
    Raises:
        ValueError: ranks have parts of the weights that an adapter is to be merged into.
    """
    asked = _division(model)
    if asked is not None and asked.tp_size > 1:
        raise ValueError(
            f"tp_size={asked.tp_size}: found weights that ranks have parts of, wanted whole ones to merge an adapter into: merge it in "
            "one process, or into the files by `deepseek-moe convert merge-adapter`"
        )


def _division(model: nn.Module):
    """The `DistributedConfig` by which ranks divide the model; ``None`` where they do not."""
    asked = getattr(model.config, "distributed_config", None)
    return asked if getattr(model, "is_distributed_loading_by_transformers", False) else None


def _check_tensor_parallel(sizes: str, rules: dict[str, str], modules: dict[str, nn.Module], targets: Targets) -> None:
    config = targets.config
    if config.peft_type.value != "LORA":
        raise ValueError(f"{sizes}: found an adapter of {config.peft_type.value}, wanted LoRA, DDP, or fsdp_size")
    if found := variants(config):
        said = ", ".join(f"{field}={str(value)[:40]}" for field, value in found.items())
        raise ValueError(
            f"{sizes}: found {said}, which looks at weights that a rank has a part of, wanted LoRA or rsLoRA whose matrices "
            "start from random numbers and zeros, DDP, or fsdp_size"
        )
    copies = getattr(config, "modules_to_save", None) or ()
    for name, module in modules.items():
        rule = rules.get(re.sub(r"\b\d+\b", "*", name))
        if rule is not None and rule not in LORA_RULES and targets.reaches(name):
            raise ValueError(
                f"{sizes}: {name}: found a layer under the rule {rule!r} among target_modules, wanted one under "
                f"{', '.join(LORA_RULES)} or none, or DDP, or fsdp_size"
            )
        parts = name.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if rule is not None and any(suffix(copied, parent) for copied in copies for parent in parents):
            raise ValueError(
                f"{sizes}: {name}: found a layer under the rule {rule!r} among modules_to_save={list(copies)}, whose copy would "
                "compute with the layer's own weight, wanted one that ranks do not divide, or DDP, or fsdp_size"
            )
        for parameter in module._parameters.values():
            if parameter is not None and is_dtensor(parameter) and any(formats.of_codes(parameter.dtype)):
                raise ValueError(
                    f"{sizes}: {name}: found {parameter.dtype} codes that several ranks have parts of, all of which peft would gather "
                    "to save an adapter, wanted floating-point weights: FineGrainedFP8Config(dequantize=True); or DDP, or fsdp_size"
                )


def tell_width(module: nn.Module) -> None:
    """Give LoRA on a layer that is divided by what it reads the width of the whole layer.

    transformers' style of that name reads it from ``lora_A``, where peft has left the width of a rank's part.
    """
    base = module._modules.get("base_layer")
    if base is None or getattr(base, "_hf_tp_plan", None) != "rowwise":
        return
    for first in module.lora_A.values():
        first.in_features = base.in_features
