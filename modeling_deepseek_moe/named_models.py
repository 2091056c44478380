"""Models of other makers whose config is DeepSeek-V3's under other names, bound to the one implementation in `modeling`."""

from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from modeling_deepseek_moe.families import (
    AXK1Config,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    KimiK25Config,
    SarvamMLAConfig,
    YoutuConfig,
)
from modeling_deepseek_moe.modeling import DeepseekMoeForCausalLM, DeepseekMoeModel, DeepseekMoePreTrainedModel


class KimiK25Model(DeepseekMoeModel):
    config_class = KimiK25Config


class KimiK25ForCausalLM(DeepseekMoeForCausalLM):
    config_class = KimiK25Config
    model_class = KimiK25Model
    release_architecture = "KimiK25ForConditionalGeneration"


class KimiK25ForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = KimiK25Config


class KimiK25ForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = KimiK25Config


class Glm4MoeLiteModel(DeepseekMoeModel):
    config_class = Glm4MoeLiteConfig


class Glm4MoeLiteForCausalLM(DeepseekMoeForCausalLM):
    config_class = Glm4MoeLiteConfig
    model_class = Glm4MoeLiteModel


class Glm4MoeLiteForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = Glm4MoeLiteConfig


class Glm4MoeLiteForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = Glm4MoeLiteConfig


class YoutuModel(DeepseekMoeModel):
    config_class = YoutuConfig


class YoutuForCausalLM(DeepseekMoeForCausalLM):
    config_class = YoutuConfig
    model_class = YoutuModel


class YoutuForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = YoutuConfig


class YoutuForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = YoutuConfig


class SarvamMLAModel(DeepseekMoeModel):
    config_class = SarvamMLAConfig


class SarvamMLAForCausalLM(DeepseekMoeForCausalLM):
    config_class = SarvamMLAConfig
    model_class = SarvamMLAModel


class SarvamMLAForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = SarvamMLAConfig


class SarvamMLAForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = SarvamMLAConfig


class AXK1Model(DeepseekMoeModel):
    config_class = AXK1Config


class AXK1ForCausalLM(DeepseekMoeForCausalLM):
    config_class = AXK1Config
    model_class = AXK1Model


class AXK1ForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = AXK1Config


class AXK1ForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = AXK1Config


class DeepseekV32Model(DeepseekMoeModel):
    config_class = DeepseekV32Config


class DeepseekV32ForCausalLM(DeepseekMoeForCausalLM):
    config_class = DeepseekV32Config
    model_class = DeepseekV32Model


class DeepseekV32ForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = DeepseekV32Config


class DeepseekV32ForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = DeepseekV32Config


class GlmMoeDsaModel(DeepseekMoeModel):
    config_class = GlmMoeDsaConfig


class GlmMoeDsaForCausalLM(DeepseekMoeForCausalLM):
    config_class = GlmMoeDsaConfig
    model_class = GlmMoeDsaModel


class GlmMoeDsaForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = GlmMoeDsaConfig


class GlmMoeDsaForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = GlmMoeDsaConfig
