"""Training as the V3 report does it, under the plain `Trainer`: balancing, losses, telemetry, FP8."""

from modeling_deepseek_moe.training.fp8 import Fp8TrainingConfig, prepare_fp8_training
from modeling_deepseek_moe.training.indexer import IndexerLossCallback
from modeling_deepseek_moe.training.load_balance import LoadBalanceCallback
from modeling_deepseek_moe.training.losses import BalanceLossCallback, MtpLossCallback
from modeling_deepseek_moe.training.moments import bf16_moments
from modeling_deepseek_moe.training.sharded import ShardedTrainingCallback
from modeling_deepseek_moe.training.telemetry import MoeTelemetryCallback

__all__ = [
    "BalanceLossCallback",
    "Fp8TrainingConfig",
    "IndexerLossCallback",
    "LoadBalanceCallback",
    "MoeTelemetryCallback",
    "MtpLossCallback",
    "ShardedTrainingCallback",
    "bf16_moments",
    "prepare_fp8_training",
]
