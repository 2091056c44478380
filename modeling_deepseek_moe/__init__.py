"""DeepSeek MoE models for transformers. Importing this package registers them; nothing else has a side effect.

``AutoModelForCausalLM.from_pretrained`` then loads DeepSeek-V2, V2-Lite, V3, R1, Moonlight and Kimi-K2 checkpoints, and
those of the other model types in `families`, as they were released.
"""

import importlib
from typing import TYPE_CHECKING, Any

from modeling_deepseek_moe import registration
from modeling_deepseek_moe._version import __version__
from modeling_deepseek_moe.anatomy import ParameterBreakdown, parameter_breakdown, read_config
from modeling_deepseek_moe.cache import Fp8StaticCache
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import write_checkpoint
from modeling_deepseek_moe.compat import warn_untested
from modeling_deepseek_moe.config import DeepseekMoeConfig, DeepseekV2Config, DeepseekV3Config
from modeling_deepseek_moe.families import (
    AXK1Config,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    KimiK2Config,
    KimiK25Config,
    SarvamMLAConfig,
    YoutuConfig,
)
from modeling_deepseek_moe.inspection import Inspection, inspect_checkpoint
from modeling_deepseek_moe.machine import Machine, probe_machine
from modeling_deepseek_moe.modeling import (
    DeepseekMoeForCausalLM,
    DeepseekMoeModel,
    DeepseekMoePreTrainedModel,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
    KimiK2ForCausalLM,
    KimiK2ForSequenceClassification,
    KimiK2ForTokenClassification,
    KimiK2Model,
)
from modeling_deepseek_moe.named_models import (
    AXK1ForCausalLM,
    AXK1ForSequenceClassification,
    AXK1ForTokenClassification,
    AXK1Model,
    DeepseekV32ForCausalLM,
    DeepseekV32ForSequenceClassification,
    DeepseekV32ForTokenClassification,
    DeepseekV32Model,
    Glm4MoeLiteForCausalLM,
    Glm4MoeLiteForSequenceClassification,
    Glm4MoeLiteForTokenClassification,
    Glm4MoeLiteModel,
    GlmMoeDsaForCausalLM,
    GlmMoeDsaForSequenceClassification,
    GlmMoeDsaForTokenClassification,
    GlmMoeDsaModel,
    KimiK25ForCausalLM,
    KimiK25ForSequenceClassification,
    KimiK25ForTokenClassification,
    KimiK25Model,
    SarvamMLAForCausalLM,
    SarvamMLAForSequenceClassification,
    SarvamMLAForTokenClassification,
    SarvamMLAModel,
    YoutuForCausalLM,
    YoutuForSequenceClassification,
    YoutuForTokenClassification,
    YoutuModel,
)
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend
from modeling_deepseek_moe.planning import make_plan

warn_untested()
registration.register()

# transformers' callbacks import what Trainer needs: a second, and optional libraries, that only training pays for.
if TYPE_CHECKING:
    from modeling_deepseek_moe.templates import complete_template
    from modeling_deepseek_moe.tiny import tiny_checkpoint
    from modeling_deepseek_moe.training import (
        BalanceLossCallback,
        Fp8TrainingConfig,
        IndexerLossCallback,
        LoadBalanceCallback,
        MoeTelemetryCallback,
        MtpLossCallback,
        ShardedTrainingCallback,
        bf16_moments,
        prepare_fp8_training,
    )
else:  # a type checker takes any name of a module that has `__getattr__`
    _LATER = {
        "BalanceLossCallback": "training",
        "Fp8TrainingConfig": "training",
        "LoadBalanceCallback": "training",
        "MoeTelemetryCallback": "training",
        "IndexerLossCallback": "training",
        "MtpLossCallback": "training",
        "ShardedTrainingCallback": "training",
        "bf16_moments": "training",
        "prepare_fp8_training": "training",
        "complete_template": "templates",
        "tiny_checkpoint": "tiny",
    }

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AXK1Config",
    "AXK1ForCausalLM",
    "AXK1ForSequenceClassification",
    "AXK1ForTokenClassification",
    "AXK1Model",
    "BackendError",
    "BalanceLossCallback",
    "CheckpointError",
    "CheckpointReader",
    "DeepseekMoeConfig",
    "DeepseekMoeForCausalLM",
    "DeepseekMoeModel",
    "DeepseekMoePreTrainedModel",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV32Config",
    "DeepseekV32ForCausalLM",
    "DeepseekV32ForSequenceClassification",
    "DeepseekV32ForTokenClassification",
    "DeepseekV32Model",
    "Fp8StaticCache",
    "Fp8TrainingConfig",
    "Glm4MoeLiteConfig",
    "Glm4MoeLiteForCausalLM",
    "Glm4MoeLiteForSequenceClassification",
    "Glm4MoeLiteForTokenClassification",
    "Glm4MoeLiteModel",
    "GlmMoeDsaConfig",
    "GlmMoeDsaForCausalLM",
    "GlmMoeDsaForSequenceClassification",
    "GlmMoeDsaForTokenClassification",
    "GlmMoeDsaModel",
    "IndexerLossCallback",
    "Inspection",
    "KimiK2Config",
    "KimiK2ForCausalLM",
    "KimiK2ForSequenceClassification",
    "KimiK2ForTokenClassification",
    "KimiK2Model",
    "KimiK25Config",
    "KimiK25ForCausalLM",
    "KimiK25ForSequenceClassification",
    "KimiK25ForTokenClassification",
    "KimiK25Model",
    "LoadBalanceCallback",
    "Machine",
    "MoeTelemetryCallback",
    "MtpLossCallback",
    "ParameterBreakdown",
    "SarvamMLAConfig",
    "SarvamMLAForCausalLM",
    "SarvamMLAForSequenceClassification",
    "SarvamMLAForTokenClassification",
    "SarvamMLAModel",
    "ShardedTrainingCallback",
    "YoutuConfig",
    "YoutuForCausalLM",
    "YoutuForSequenceClassification",
    "YoutuForTokenClassification",
    "YoutuModel",
    "__version__",
    "bf16_moments",
    "complete_template",
    "inspect_checkpoint",
    "make_plan",
    "parameter_breakdown",
    "prepare_fp8_training",
    "probe_machine",
    "read_config",
    "tiny_checkpoint",
    "use_backend",
    "write_checkpoint",
]
