"""Routed experts as one operation: ``out_t = Σ_k weight_tk · down_k(silu(gate_k(x_t)) · up_k(x_t))``.

What it computes is defined in `reference`, expert by expert; `cpu` does a whole layer in one call, on weights that are
FP8 or bf16 and lie stacked, mapped or anywhere in memory; `trained` is the layer with its gradients.
"""

from modeling_deepseek_moe.ops.experts import cpu
from modeling_deepseek_moe.ops.experts.reference import Slots, run_experts
from modeling_deepseek_moe.ops.experts.trained import RoutedSwiGlu

__all__ = ["RoutedSwiGlu", "Slots", "cpu", "run_experts"]
