"""What a user sees of a model that is part on an accelerator, part on the CPU: a device map, a budget, figures."""

from enum import Enum

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.writer import parse_size
from modeling_deepseek_moe.device_memory import NEITHER, accelerator, give_back
from modeling_deepseek_moe.hybrid import costs
from modeling_deepseek_moe.hybrid.layer import HybridMoE
from modeling_deepseek_moe.hybrid.placement import device_of
from modeling_deepseek_moe.hybrid.places import ExpertPlaces
from modeling_deepseek_moe.hybrid.slots import ExpertSlots, SlotStats, expert_bytes
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.ops._memory import exhausted
from modeling_deepseek_moe.streaming.model import StreamingMixin

logger = logging.get_logger(__name__)
AUTO = "auto"


class _Unchanged(Enum):
    UNCHANGED = "unchanged"


UNCHANGED = _Unchanged.UNCHANGED


class HybridMixin(StreamingMixin):
    """Experts on the CPU of a model on an accelerator. Mixed into the models before `PreTrainedModel`."""

    def set_expert_memory(
        self,
        budget: float | str | _Unchanged | None = UNCHANGED,
        *,
        gpu: float | str | _Unchanged | None = UNCHANGED,
        compute: str = AUTO,
    ) -> None:
        """Hold routed experts in so much memory of their own: main memory (``budget``), or an accelerator's (``gpu``).

        ``budget`` is for experts that are mapped from their files: the others are read as they are needed, and results are
        the same to the last bit. What was held before is dropped, and figures begin at zero. A copy of the model is mapped
        until it is given a budget. Experts that an adapter is on afterwards are read from the mapped files, outside of it.

        ``gpu`` is for a model on an accelerator whose experts lie on the CPU (``device_map="auto"`` and a model larger than
        the accelerator, or a map with ``{"": 0, "model.layers.*.mlp.experts": "cpu"}``).

        Args:
            budget: bytes, or text such as ``"8GB"``; ``None``: no memory of their own, the mapped files are read.
                More than the experts take is not used; more than is available is told in a warning.
            gpu: likewise, of the accelerator; ``None``: no expert is held there.
            compute: ``"cpu"``: the accelerator keeps the most used experts and computes them, the CPU computes the others;
                ``"gpu"``: it computes all, and copies those that it lacks, in place of what was used longest ago;
                ``"auto"``: the faster of both for one token, by measured bandwidths, else the first.

        Raises:
            ValueError: the model has no such experts, or an adapter on them, or a budget is too small: for main memory, of
                two experts; for an accelerator, of what a token uses in one layer.
            torch.OutOfMemoryError: the accelerator has less free than that; nothing of it is kept.
        """
        if isinstance(budget, _Unchanged) and isinstance(gpu, _Unchanged):
            raise ValueError("set_expert_memory: found no budget, wanted one, or gpu=")
        if compute not in (AUTO, costs.CPU, costs.DEVICE):
            raise ValueError(f"compute={compute!r} is not one of {AUTO!r}, {costs.CPU!r}, {costs.DEVICE!r}")
        if not isinstance(gpu, _Unchanged):
            _set_device_memory(
                self, None if gpu is None else parse_size(gpu if isinstance(gpu, str) else int(gpu)), compute
            )
        if not isinstance(budget, _Unchanged):
            super().set_expert_memory(budget)

    def gpu_expert_stats(self, reset: bool = False) -> SlotStats | None:
        """Figures of the experts in an accelerator's memory since they were given it, or the last ``reset``."""
        places = _places(self)
        slots = None if places is None else places.passing if places.held is None else places.held.slots
        return None if slots is None else slots.stats(reset)


def place_experts(model: PreTrainedModel, device_map: object) -> None:
    """Where a device map leaves experts on the CPU and has an accelerator too: make their layers compute them there.

    Called before the map is carried out. Entries of such experts are taken out of it if all else is on one device: no hook of
    accelerate is needed then, which would copy them to the accelerator for each token.
    """
    if not isinstance(device_map, dict):
        return
    names = [device for device in dict.fromkeys(device_map.values()) if str(device) not in NEITHER]
    layers = _layers_apart(model, device_map) if names else {}
    by_device: dict[torch.device, list[nn.Module]] = {}
    for name, layer in layers.items():
        found = device_of(device_map, f"{name}.mlp.gate")
        device = accelerator(found if str(found) not in NEITHER else names[0])
        by_device.setdefault(device, []).append(layer)
    for device, those in by_device.items():
        experts = {layer.mlp.layer_idx: layer.mlp.experts for layer in those}
        places = ExpertPlaces(device, experts, model.config.num_experts_per_tok)
        for layer in those:
            layer.mlp = HybridMoE.of(layer.mlp, places)
        if device.type == "cuda" and torch.cuda.is_available():
            _prepare_prompts(model.config, places)
    rest = {name: device for name, device in device_map.items() if not name.endswith(".mlp.experts")}
    if layers and set(map(str, rest.values())) == {str(names[0])}:
        device_map.clear()
        device_map.update(rest)


def unhook_experts(model: PreTrainedModel) -> None:
    """Take accelerate's hooks off experts on the CPU, which a map with several devices has put there."""
    for module in model.modules():
        if isinstance(module, HybridMoE):
            remove_hook_from_submodules(module.experts)


def _layers_apart(model: PreTrainedModel, device_map: dict) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "mlp", None), DeepseekMoE)
        and str(device_of(device_map, f"{name}.mlp.experts")) == "cpu"
    }


def _places(model: PreTrainedModel) -> ExpertPlaces | None:
    """
    Raises:
        ValueError: there are several, of as many accelerators.
    """
    found = {mlp.places for mlp in _hybrid_layers(model) if mlp.places is not None}
    if len(found) > 1:
        names = ", ".join(sorted(str(places.crossing.device) for places in found))
        raise ValueError(f"gpu expert memory: found layers on {names}, wanted all on one accelerator")
    return next(iter(found), None)


def _hybrid_layers(model: PreTrainedModel) -> list[HybridMoE]:
    mlps = (getattr(layer, "mlp", None) for layer in getattr(model.base_model, "layers", ()))
    return [mlp for mlp in mlps if isinstance(mlp, HybridMoE)]


def _prepare_prompts(config, places: ExpertPlaces) -> None:
    """Measure, and take memory for the experts that prompts bring to the device, where that would pay."""
    device = places.crossing.device
    try:
        places.rates = costs.measure_rates(device)
        places.passing = ExpertSlots(config, next(iter(places.layers.values())), 2 * places.top_k, device)
    except (RuntimeError, ValueError) as error:
        places.passing = None
        if isinstance(error, RuntimeError) and exhausted(error) is None:
            raise
        logger.warning(f"The CPU computes the experts of prompts too: {error}")


def _set_device_memory(model: PreTrainedModel, budget: int | None, compute: str) -> None:
    places = _places(model)
    if places is None:
        if budget is None:
            return
        raise ValueError(
            'gpu expert memory: found no experts apart from an accelerator, wanted a model loaded with device_map="auto" that '
            'does not fit it, or with device_map={"": 0, "model.layers.*.mlp.experts": "cpu"}'
        )
    current = {mlp.layer_idx: mlp.experts for mlp in _hybrid_layers(model)}
    if budget is not None and any(current[layer] is not module for layer, module in places.layers.items()):
        raise ValueError(
            "gpu expert memory: found an adapter around experts, wanted none: call it before the adapter is made"
        )
    first = next(iter(places.layers.values()))
    size, total = expert_bytes(first), len(places.layers) * first.num_experts
    least = places.top_k * size
    if budget is not None and budget < least:
        raise ValueError(
            f"gpu expert memory of {budget:,} bytes is too small: the least is {least:,} bytes, the {places.top_k} experts of "
            "a layer that a token uses"
        )
    places.release()
    if budget is None:
        return
    count, failure = min(budget // size, total), None
    try:
        slots = ExpertSlots(model.config, first, count, places.crossing.device)
        places.take(slots, compute, count / total)
    except BaseException as error:
        failure = exhausted(error) if isinstance(error, RuntimeError) else None
        places.release()
        slots = None  # it would stay in the traceback
        if failure is None:
            raise
    if failure is not None:
        device = places.crossing.device
        raise torch.OutOfMemoryError(
            f"gpu expert memory of {budget:,} bytes, {count} experts of {size:,} bytes: found too little free on {device} "
            f"({failure}); the model goes on without, {give_back(device)}: wanted a smaller gpu="
        )
