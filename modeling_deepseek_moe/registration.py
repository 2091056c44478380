"""Registering the family with transformers' Auto classes, over the built-in classes of the same model types.

The built-in classes stay reachable by name, e.g. ``transformers.DeepseekV3ForCausalLM``.
"""

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from modeling_deepseek_moe import modeling, named_models, quantizer  # noqa: F401 (importing quantizer registers it)
from modeling_deepseek_moe.families import FAMILIES
from modeling_deepseek_moe.ops.experts import IMPLEMENTATION, routed_swiglu

HEADS = {
    "Model": transformers.AutoModel,
    "ForCausalLM": transformers.AutoModelForCausalLM,
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForTokenClassification": transformers.AutoModelForTokenClassification,
}
# By class name: how `Trainer` knows, for one, that label smoothing has to shift the labels.
NAMES = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


class KimiK25Whole:
    """What Auto classes for images make of Kimi-K2.5: transformers' own class, though the config they read is this package's."""

    @classmethod
    def from_pretrained(cls, *arguments, config: PreTrainedConfig, **settings) -> PreTrainedModel:
        return transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
            *arguments, config=cls._config(config), **settings
        )

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **settings) -> PreTrainedModel:
        return transformers.Kimi_K25ForConditionalGeneration._from_config(cls._config(config), **settings)

    @staticmethod
    def _config(config: PreTrainedConfig) -> PreTrainedConfig:
        whole = transformers.Kimi_K25Config.from_dict(config.write_release(config.to_dict()))
        # what was asked for as the config was read is not among its fields
        whole._attn_implementation = config._attn_implementation
        whole._experts_implementation = config._experts_implementation
        return whole


def model_class(name: str) -> type:
    """The model of that name."""
    return getattr(modeling if hasattr(modeling, name) else named_models, name)


def register() -> None:
    """Register configs, models and expert conversions (the latter serve adapters and sharded saves)."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_swiglu)
    for family, config in FAMILIES.items():
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        is_part = bool(config.names.prefix)  # of a larger model, whose type and conversions are that one's
        for head, auto_class in HEADS.items():
            auto_class.register(config, model_class(family + head), exist_ok=True)
            # Under a model type of its own, transformers would look the name up among its own classes.
            if family + head not in NAMES[head].values():
                is_own = config.model_type in CONFIG_MAPPING_NAMES
                NAMES[head][family if is_own else config.model_type] = family + head
            if is_part:
                register_checkpoint_conversion_mapping(family + head, _conversions(), overwrite=True)
        if not is_part:
            # transformers' own where it has the type, which its own class needs too: a type not registered here would get none
            mapping = get_checkpoint_conversion_mapping(config.model_type) or _conversions()
            register_checkpoint_conversion_mapping(config.model_type, mapping, overwrite=True)
    for auto_class in (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM):
        auto_class.register(FAMILIES["KimiK25"], KimiK25Whole, exist_ok=True)
    # in the mappings themselves: the Auto classes' `register` refuses what stands for a class where torchvision is missing
    for processors in (PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING):
        processors.register(FAMILIES["KimiK25"], processors[transformers.Kimi_K25Config], exist_ok=True)


def _conversions() -> list[WeightConverter]:
    experts = "mlp.experts.*."
    return [
        WeightConverter(
            [f"{experts}gate_proj.weight", f"{experts}up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(f"{experts}down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ]
