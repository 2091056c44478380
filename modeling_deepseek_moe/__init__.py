"""DeepSeek MoE models for transformers. Importing this package registers them; nothing else has a side effect.

``AutoModelForCausalLM.from_pretrained`` then loads DeepSeek-V2, V2-Lite, V3, R1, Moonlight and Kimi-K2 checkpoints
as they were released.
"""

import importlib

from modeling_deepseek_moe import registration
from modeling_deepseek_moe._version import __version__
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import write_checkpoint
from modeling_deepseek_moe.compat import warn_untested
from modeling_deepseek_moe.config import DeepseekMoeConfig, DeepseekV2Config, DeepseekV3Config, KimiK2Config
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
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend

warn_untested()
registration.register()

# transformers' callbacks import what Trainer needs: a second, and optional libraries, that only training pays for.
_LATER = {
    "BalanceLossCallback": "training",
    "Fp8TrainingConfig": "training",
    "LoadBalanceCallback": "training",
    "MoeTelemetryCallback": "training",
    "MtpLossCallback": "training",
    "bf16_moments": "training",
    "prepare_fp8_training": "training",
    "tiny_checkpoint": "tiny",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(f"modeling_deepseek_moe.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
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
    "Fp8TrainingConfig",
    "KimiK2Config",
    "KimiK2ForCausalLM",
    "KimiK2ForSequenceClassification",
    "KimiK2ForTokenClassification",
    "KimiK2Model",
    "LoadBalanceCallback",
    "MoeTelemetryCallback",
    "MtpLossCallback",
    "__version__",
    "bf16_moments",
    "prepare_fp8_training",
    "tiny_checkpoint",
    "use_backend",
    "write_checkpoint",
]
