"""transformers' side of the weight formats: the quantization config and quantizer that load them for this family.

They are registered under a name of their own (`QUANT_METHOD`); `config` maps the release's ``quant_method`` to it in memory.
The quantizer that other models get for "fp8" is untouched.
"""

import torch
import transformers
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.config import QUANT_METHOD, on_disk
from modeling_deepseek_moe.device_memory import AUTOMATIC
from modeling_deepseek_moe.hybrid.placement import device_of
from modeling_deepseek_moe.loading import release_for
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import PROJECTIONS, MappedExperts
from modeling_deepseek_moe.release import Release
from modeling_deepseek_moe.streaming.model import enable_streaming_if_needed


@register_quantization_config(QUANT_METHOD)
class FineGrainedFP8Config(transformers.FineGrainedFP8Config):
    """The release's ``quantization_config``. Same name as transformers' own, which a caller passes to dequantise.

    Raises:
        ValueError: a format that is not among `formats.FORMATS`.
    """

    def __init__(self, **fields):
        super().__init__(**fields)
        self.quant_method = QUANT_METHOD
        self.release_fields = on_disk({**fields, "quant_method": QUANT_METHOD})
        self.weight_format = formats.of_config(self.release_fields)

    def to_dict(self) -> dict:
        """The fields as the release had them."""
        return dict(self.release_fields)


@register_quantizer(QUANT_METHOD)
class DeepseekQuantizer(HfQuantizer):
    """Prepares a model for a quantised release, before any weight is read.

    Linear layers whose weight is codes in the files become `QuantizedLinear`. Routed experts stay in the mapped files when
    the model lives on the CPU, and are stacked on another device. With ``dequantize=True`` the model stays as
    it is and `lazy_state_dict` hands it floating-point weights.
    """

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError("this quantizer loads quantised checkpoints; it does not quantise while loading")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        release = release_for(model, checkpoint_files)
        if self.quantization_config.dequantize:
            for name, value in formats.memory(release.weight_format).items() if release.weight_format else ():
                setattr(model.config, name, value)
            return
        prefix = "model." if model.base_model is model else ""
        for name, module in list(model.named_modules()):
            form = release.format_of(f"{prefix}{name}.weight") if isinstance(module, nn.Linear) else None
            if form is not None:
                with torch.device("meta"):
                    new = QuantizedLinear(module.in_features, module.out_features, module.bias is not None, form)
                model.set_submodule(name, new)
            elif isinstance(module, DeepseekExperts) and (
                experts := _quantized_experts(release, prefix + name, _stays_on_cpu(_map_of(device_map, name)))
            ):
                model.set_submodule(name, experts)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            for name in getattr(module, "dtype_kept", ()):
                if name in module._parameters:
                    module._parameters[name].requires_grad_(False)
        enable_streaming_if_needed(model)
        return model

    def _dequantize(self, model, dtype=None):
        raise ValueError(
            f"dequantize(): found weights in {self.quantization_config.weight_format.name!r}, wanted them dequantised as they are "
            'read: load the folder with quantization_config=FineGrainedFP8Config(dequantize=True), dtype="bfloat16"'
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on FP8 weights; the weights themselves do not. Load with ``dequantize=True`` to train them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return False


def _quantized_experts(release: Release, name: str, on_cpu: bool) -> nn.Module | None:
    """A layer's routed experts, if they are codes: all of them or none, since they are stored in one way."""
    experts = range(release.config.n_routed_experts)
    names = [f"{name}.{expert}.{projection}.weight" for expert in experts for projection in PROJECTIONS]
    codes = [release.infos[weight] for weight in names]  # a gap was refused already
    weight_format = next((form for weight in names if (form := release.format_of(weight))), None)
    if weight_format is None:
        return None
    plain = [info for info in codes if info.dtype != weight_format.code_dtype]
    if plain:
        info = plain[0]
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found dtype {info.dtype}, wanted {weight_format.code_dtype} like the "
            "layer's other experts"
        )
    if not on_cpu:
        with torch.device("meta"):
            return StackedQuantizedExperts(release.config, weight_format)
    scales = release.scales_of_experts(names)
    mapped = MappedExperts(release.config, weight_format, codes, scales, release.reader.mapped)
    mapped.addresses()  # kept from here on: how they are found is nothing that torch.compile can trace
    return mapped


def _map_of(device_map, name: str):
    """What a device map says of one module."""
    return device_of(device_map, name) if isinstance(device_map, dict) else device_map


def _stays_on_cpu(device_map) -> bool:
    """Whether a module does, by what the device map says of it."""
    if device_map is None or str(device_map) == "cpu":
        return True
    return str(device_map) in AUTOMATIC and not torch.accelerator.is_available()
