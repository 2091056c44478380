"""bitsandbytes' part of loading: which routed experts become codes, and how the codes are made or read, one expert at a time.

transformers' own quantizer puts bitsandbytes' layers in place of linear ones. Routed experts are no linear layers, and it
leaves them; here they become `BitsAndBytesExperts` by the same skip list. The weights to quantise come from a release, in
floating point or in a format of its own, such as FP8, and a matrix is decoded, quantised and forgotten before the next one.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import CONFIG_NAME, logging

from modeling_deepseek_moe.bnb.formats import INT8, METHOD, STORAGE
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.config import own_formats
from modeling_deepseek_moe.formats import by_name, memory
from modeling_deepseek_moe.formats.row import WeightFormat
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops.four_bit import nested_table
from modeling_deepseek_moe.quantized.bitsandbytes_experts import (
    MAP,
    BitsAndBytesExperts,
    BitsAndBytesMatrices,
    parameter_of,
)
from modeling_deepseek_moe.release import Release
from modeling_deepseek_moe.weights import LazyTensor

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where a config is found.
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def bitsandbytes_config(fields) -> BitsAndBytesConfig | None:
    """A quantization config as bitsandbytes' own, given as an object or its fields; ``None`` if it is another quantiser's."""
    if isinstance(fields, BitsAndBytesConfig) or fields is None:
        return fields
    if not isinstance(fields, Mapping):
        return None
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    if method != METHOD and not (method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit"))):
        return None
    return BitsAndBytesConfig.from_dict(dict(fields))


def quantize_experts(model: PreTrainedModel, config: BitsAndBytesConfig, device_map=None) -> None:
    """Put `BitsAndBytesExperts`, without data, where ``config`` quantises experts of a model that is to be loaded.

    Experts are left as they are by the names that leave linear layers as they are: their module's (``experts``,
    ``mlp.experts``, ``model.layers.1``), or those of all their projections (``gate_proj``, ``up_proj`` and ``down_proj``).
    """
    if config.load_in_8bit and config.llm_int8_has_fp16_weight:
        return  # bitsandbytes holds such layers in fp16
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    if config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, Mapping):
        skipped += [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
    partly = []
    for name, module in _plain_experts(model):
        names = [f"{name}.{index}.{projection}" for index in range(module.num_experts) for projection in PROJECTIONS]
        kept = [part for part in names if not should_convert_module(part, skipped)]
        if not should_convert_module(name, skipped) or len(kept) == len(names):
            continue
        if kept:
            partly.append(f"{name} (for {kept[0]})")
            continue
        _replace(model, name, module, _kind(config), config.bnb_4bit_use_double_quant, config)
    if config.load_in_4bit and config.bnb_4bit_quant_storage != torch.uint8 and stacked_experts(model):
        logger.warning(
            f"{STORAGE}={str(config.bnb_4bit_quant_storage).removeprefix('torch.')} is for linear layers: codes of routed experts stay uint8."
        )
    if partly:
        logger.warning(
            f"llm_int8_skip_modules names some projections of routed experts and not others, which lie in one stack: {', '.join(partly)} "
            "stay as they are, all projections. Name 'experts' there, or gate_proj, up_proj and down_proj together."
        )


def recognize_experts(model: PreTrainedModel, config: BitsAndBytesConfig, release: Release) -> None:
    """Put `BitsAndBytesExperts`, without data, where a release that was saved quantised holds codes of experts."""
    for name, module in _plain_experts(model):
        first = f"{prefix_of(model)}{name}.0.gate_proj.weight"
        for kind in ("nf4", "fp4"):
            if f"{first}.quant_state.bitsandbytes__{kind}" in release.infos:
                _replace(model, name, module, kind, f"{first}.nested_absmax" in release.infos, config)
        if first.replace(".weight", ".SCB") in release.infos:
            _replace(model, name, module, "int8", False, config)


def _plain_experts(model: nn.Module) -> list[tuple[str, DeepseekExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DeepseekExperts)]


def prefix_of(model: PreTrainedModel) -> str:
    """What a model's own names lack of a release's."""
    return "model." if model.base_model is model else ""


def _kind(config: BitsAndBytesConfig) -> str:
    return config.bnb_4bit_quant_type if config.load_in_4bit else "int8"


def _replace(model, name: str, module: DeepseekExperts, kind: str, nested: bool, config: BitsAndBytesConfig) -> None:
    compute_dtype = None if kind == "int8" else config.bnb_4bit_compute_dtype
    with torch.device("meta"):
        experts = BitsAndBytesExperts(
            model.config,
            INT8 if kind == "int8" else by_name(kind),
            nested and kind != "int8",
            compute_dtype,
            module.gate_up_proj.dtype,
        )
    model.set_submodule(name, experts)


def coded_experts(model: nn.Module) -> dict[str, BitsAndBytesMatrices]:
    """By their names in ``model``, stacked and mapped ones."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitsAndBytesMatrices)}


def stacked_experts(model: nn.Module) -> dict[str, BitsAndBytesExperts]:
    """Of `coded_experts` those whose tensors are parameters."""
    return {name: module for name, module in coded_experts(model).items() if isinstance(module, BitsAndBytesExperts)}


def quantized_stacks(model: PreTrainedModel, release: Release, device_of: Callable[[str], torch.device | str | int]):
    """The tensors of all `BitsAndBytesExperts` by name, made from a release's floating-point or FP8 weights as they are read."""
    found: dict[str, LazyTensor] = {}
    for name, module in stacked_experts(model).items():
        found |= _QuantizedStacks(name, prefix_of(model), module, release, device_of(f"{name}.gate_codes")).tensors()
    return found


class _QuantizedStacks:
    """Of one layer: a projection of all experts is quantised, matrix by matrix, when the first of its tensors is read."""

    def __init__(self, name: str, prefix: str, module: BitsAndBytesExperts, release: Release, device):
        self._name, self._source = name, f"{prefix}{name}"
        self._module, self._release, self._device = module, release, device
        self._made: dict[str, dict[str, torch.Tensor]] = {}
        for info in self._sources():
            if info not in release.infos:
                raise CheckpointError(
                    f"{release.where(info)}: tensor {info}: found no such tensor, wanted it to quantise"
                )

    def _sources(self) -> Iterator[str]:
        for index in range(self._module.num_experts):
            yield from (f"{self._source}.{index}.{projection}.weight" for projection in self._module.shapes)

    def tensors(self) -> dict[str, LazyTensor]:
        found = {}
        for projection in self._module.shapes:
            for part, (shape, dtype) in self._module.layout(projection).items():
                found[f"{self._name}.{parameter_of(projection, part)}"] = LazyTensor(
                    lambda projection=projection, part=part: self._take(projection, part),
                    (self._module.num_experts, *shape),
                    dtype,
                )
        if self._module.nested:
            found[f"{self._name}.{MAP}"] = LazyTensor(nested_table, (256,), torch.float32)
        return found

    def _take(self, projection: str, part: str) -> torch.Tensor:
        made = self._made.pop(projection, None)
        if made is None or part not in made:
            made = self._make(projection)
        tensor = made.pop(part)
        if made:
            self._made[projection] = made
        return tensor

    def _make(self, projection: str) -> dict[str, torch.Tensor]:
        module = self._module
        stacks = {
            part: torch.empty((module.num_experts, *shape), dtype=dtype, device=self._device)
            for part, (shape, dtype) in module.layout(projection).items()
        }
        for index in range(module.num_experts):
            name = f"{self._source}.{index}.{projection}.weight"
            weight = read_weight(self._release, name, module.source_dtype).to(self._device)
            for part, tensor in module.quantized(weight).items():
                stacks[part][index] = tensor
            total = stacks["nested_offset" if module.nested else "absmax"][index]
            if not torch.isfinite(total).all():
                info = self._release.infos[name]
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found a NaN or Inf, wanted finite weights to quantise"
                )
        return stacks


def read_weight(release: Release, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A release's matrix in ``dtype``, in memory of its own: what is mapped and read once would stay resident."""
    info = release.infos[name]
    held = read_apart(release.reader, info)
    if release.is_quantized(name):
        return release.format_of(name).dequantize(held, release.tensor(release.scale_name(name)), dtype)
    return held.to(dtype)


def read_apart(reader: CheckpointReader, info: TensorInfo, *, among_mapped: bool = False) -> torch.Tensor:
    """A tensor in memory of its own; ``among_mapped``: as in `CheckpointReader.read_into`."""
    held = torch.empty(info.shape, dtype=info.dtype, device="cpu")
    reader.read_into([info], lambda _: memoryview(held.view(-1).view(torch.uint8).numpy()), among_mapped=among_mapped)
    return held


class Wish(NamedTuple):
    """What a caller's `BitsAndBytesConfig` asks for: ``config`` of weights in floating point, or in the formats ``stored``."""

    config: BitsAndBytesConfig
    stored: tuple[WeightFormat, ...]


def take_wish(config_class: type[PreTrainedConfig], path, arguments: dict) -> Wish | None:
    """The wish among the ``arguments`` of a `from_pretrained`; ``None`` without one, or where weights are bitsandbytes' already.

    transformers refuses a second quantiser for weights whose config tells of a first. So an FP8 release is handed to it as a
    floating-point one, which it is once a weight was read: ``arguments`` gets a config that does not tell the format.
    """
    wanted = bitsandbytes_config(arguments.get("quantization_config"))
    if wanted is None or path is None:
        return None
    config = arguments.get("config")
    changes: dict = {}
    if not isinstance(config, PreTrainedConfig):
        if config is None and Path(path).is_dir() and not (Path(path) / CONFIG_NAME).exists():
            return Wish(wanted, ())  # an adapter's folder
        inherited = {field.name for field in fields(PreTrainedConfig)}
        own = {field.name for field in fields(config_class)} - inherited | {"rope_scaling", "rope_theta"}
        changes = {name: value for name, value in arguments.items() if name in own}
        hub = {name: value for name, value in arguments.items() if name in HUB}
        config = config_class.from_pretrained(path if config is None else config, **hub, **changes)
    if bitsandbytes_config(getattr(config, "quantization_config", None)) is not None:
        return None
    stored = own_formats(config)
    if stored:
        config = copy.deepcopy(config)
        del config.quantization_config
        for name, value in memory(stored[0]).items():
            setattr(config, name, value)
        for name in changes:
            del arguments[name]  # they are in the config, and are no arguments of a model
        arguments["config"] = config
    return Wish(wanted, stored)
