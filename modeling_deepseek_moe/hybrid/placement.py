"""Where the parts of a model lie when the accelerator is smaller than the model: a device map, made of sizes alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import get_max_memory
from transformers.utils import CONFIG_NAME, logging

from modeling_deepseek_moe.anatomy import ParameterBreakdown, parameter_breakdown
from modeling_deepseek_moe.bnb.loading import HUB, bitsandbytes_config
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.device_memory import AUTOMATIC, NEITHER

logger = logging.get_logger(__name__)
LAYER_COUNTS = ("num_hidden_layers", "num_nextn_predict_layers")
DEVICE_WORKSPACE = 1_000_000_000  # of an accelerator: its context, passing buffers, staged experts of a prompt
CONTEXT = 8192  # tokens of cache to leave room for


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model as it would be loaded: its routed experts, everything else, and the cache of `CONTEXT` tokens."""

    experts: int
    rest: int
    cache: int

    @classmethod
    def of(cls, breakdown: ParameterBreakdown, itemsize: int | None = None, *, dequantized: bool = False) -> "Sizes":
        """With codes as released, or ``dequantized``; other values in ``itemsize`` bytes (``None``: as released)."""
        form, width = None if dequantized else breakdown.weight_format, itemsize or breakdown.itemsize
        experts = breakdown.stored["routed experts"].nbytes(form, width)
        everything = breakdown.stored_bytes(form, width)
        return cls(experts, everything - experts, breakdown.cache_bytes(CONTEXT, width))


def is_hybrid(sizes: Sizes, accelerators: list[int]) -> bool:
    """Whether experts have to stay on the CPU: not all fits the accelerators, and what is no expert fits the first.

    Args:
        accelerators: bytes that each may take.
    """
    if not accelerators or not sizes.experts:
        return False
    if sizes.experts + sizes.rest + sizes.cache + DEVICE_WORKSPACE <= sum(accelerators):
        return False
    return sizes.rest + sizes.cache + DEVICE_WORKSPACE <= accelerators[0]


def experts_apart(config: DeepseekMoeConfig, device: int | str, prefix: str = "model.") -> dict[str, int | str]:
    """A device map: the routed experts of every layer on the CPU, all else on ``device``."""
    return {"": device} | dict.fromkeys(_expert_names(config, f"{prefix}layers.*.mlp.experts"), "cpu")


def expand(device_map: Mapping[str, int | str], config: DeepseekMoeConfig) -> dict[str, int | str]:
    """Keys with a star stand for every layer with experts, as in a ``tp_plan``: ``{"": 0, "model.layers.*.mlp.experts": "cpu"}``.

    Raises:
        ValueError: a key has more than one star.
    """
    found: dict[str, int | str] = {}
    for name, device in device_map.items():
        if name.count("*") > 1:
            raise ValueError(f"device_map: found {name!r}, wanted one * in it, which stands for a layer")
        names = _expert_names(config, name) if "*" in name else [name]
        found |= dict.fromkeys(names, device)
    return found


def device_of(device_map: Mapping[str, object], name: str) -> object:
    """The device of a module: of its own entry, or of the nearest one above it; ``None`` without any."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return device_map[name]


ConfigOf = Callable[[], PreTrainedConfig | None]  # see `config_to_load`; called where a device map depends on it


def device_map_of(model_class: type[PreTrainedModel], arguments: dict, config_of: ConfigOf) -> object:
    """The ``device_map`` among the ``arguments`` of a `from_pretrained`, with experts apart where it says so, or has to."""
    given = arguments["device_map"]
    starred = isinstance(given, Mapping) and any("*" in name for name in given)
    if isinstance(given, Mapping) and not starred:
        return dict(given)  # entries of experts will be taken out
    if not starred and not (isinstance(given, str) and given in AUTOMATIC and torch.accelerator.is_available()):
        return given
    config = config_of()
    if config is None:
        return given
    if starred:
        return expand(given, config)
    dtype = arguments.get("dtype")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    dequantized = bool(getattr(arguments.get("quantization_config"), "dequantize", False))
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else None
    sizes = Sizes.of(parameter_breakdown(config), itemsize, dequantized=dequantized)
    prefix = "" if hasattr(model_class, "mtp_layers") else f"{model_class.base_model_prefix}."
    return choose(given, config, sizes, get_max_memory(arguments.get("max_memory")), prefix)


def take_experts_out(device_map: object, config_of: ConfigOf, wanted: BitsAndBytesConfig | None) -> dict[str, object]:
    """Take experts on the CPU out of a ``device_map`` that has an accelerator, for bitsandbytes; returns their entries.

    transformers' quantiser refuses every part on the CPU that is not to stay in floating point there, before there is a
    model. Experts compute with their codes on a CPU too, so they get their places once it has looked.

    Args:
        wanted: what weights in floating point are to become; ``None``: what they are is in the config.
    """
    if not isinstance(device_map, dict) or all(str(device) in NEITHER for device in device_map.values()):
        return {}
    found = {name: at for name, at in device_map.items() if name.endswith(".mlp.experts") and str(at) == "cpu"}
    if found and wanted is None:
        wanted = bitsandbytes_config(getattr(config_of(), "quantization_config", None))
    if wanted is None or wanted.llm_int8_enable_fp32_cpu_offload:
        return {}
    for name in found:
        del device_map[name]
    return found


def config_to_load(model_class: type[PreTrainedModel], path, arguments: dict) -> PreTrainedConfig | None:
    """Of what a `from_pretrained` is to load; ``None`` for an adapter's folder."""
    config = arguments.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    if config is None and Path(path).is_dir() and not (Path(path) / CONFIG_NAME).exists():
        return None
    hub = {name: value for name, value in arguments.items() if name in HUB}
    layers = {name: arguments[name] for name in LAYER_COUNTS if name in arguments}
    return model_class.config_class.from_pretrained(path if config is None else config, **hub, **layers)


def choose(wish: str, config: DeepseekMoeConfig, sizes: Sizes, room: Mapping[int | str, int], prefix: str) -> object:
    """What an automatic map comes to: ``wish`` as it is, for accelerate to carry out, or experts on the CPU.

    Args:
        room: bytes of each accelerator, by number, and of others.
        prefix: of the decoder's modules: ``"model."``, or nothing for a model without a head.
    """
    accelerators = sorted(key for key in room if isinstance(key, int))
    given = [int(room[index]) for index in accelerators]
    if not is_hybrid(sizes, given):
        return wish
    logger.warning(
        f"device_map={wish!r}: the model takes {(sizes.experts + sizes.rest) / 1e9:.1f} GB and the accelerators give "
        f"{sum(given) / 1e9:.1f} GB: routed experts ({sizes.experts / 1e9:.1f} GB) stay on the CPU, which computes them; all "
        f"else is on device {accelerators[0]} (set_expert_memory(gpu=...) keeps experts there too)."
    )
    return experts_apart(config, accelerators[0], prefix)


def _expert_names(config: DeepseekMoeConfig, pattern: str) -> list[str]:
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    return [pattern.replace("*", str(layer)) for layer in range(depth) if config.is_moe_layer(layer)]
