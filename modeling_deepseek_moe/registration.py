"""Registering the family with transformers' Auto classes, over the built-in classes of the same model types.

The built-in classes stay reachable by name, e.g. ``transformers.DeepseekV3ForCausalLM``.
"""

import transformers
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modeling_deepseek_moe import modeling, quantizer  # noqa: F401 (importing quantizer registers it)
from modeling_deepseek_moe.config import FAMILIES
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


def register() -> None:
    """Register configs, models and expert conversions (the latter serve adapters and sharded saves)."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_swiglu)
    for family, config in FAMILIES.items():
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for head, auto_class in HEADS.items():
            auto_class.register(config, getattr(modeling, family + head), exist_ok=True)
            # For a type of its own, transformers would look the name up among its own classes.
            if config.model_type not in CONFIG_MAPPING_NAMES:
                NAMES[head][config.model_type] = family + head
        register_checkpoint_conversion_mapping(config.model_type, _conversions(), overwrite=True)


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
