"""From hidden states to experts and their weights, always in fp32."""

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import CPU, TRITON, may_use
from modeling_deepseek_moe.ops.linear import linear
from modeling_deepseek_moe.ops.routing import cpu, triton
from modeling_deepseek_moe.ops.routing.reference import Routing, choose, scores

__all__ = ["Routing", "route", "scores"]


def route(
    hidden_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits ``[T, E]`` in fp32, weights ``[T, K]`` in fp32 and indices ``[T, K]``.

    Args:
        bias_E: fp32, added to the scores for the choice alone.
    """
    # autocast would take this matmul to bf16, and one token in twelve to other experts
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if may_use(TRITON, triton.unsupported_hidden(hidden_TD, weight_ED)):
            logits_TE = triton.logits(hidden_TD, weight_ED)
        else:
            weight_ED = weight_ED if weight_ED.dtype == torch.bfloat16 else weight_ED.float()
            logits_TE = linear(hidden_TD.float(), weight_ED)
    # fp64 is for comparing with other software, bit by bit where that routes in torch
    if may_use(CPU, _native.unsupported_activations(hidden_TD) or cpu.unsupported_reason(logits_TE)):
        return logits_TE, *cpu.route(logits_TE, bias_E, *routing)
    if may_use(TRITON, triton.unsupported_reason(logits_TE, bias_E)):
        return logits_TE, *triton.route(logits_TE, bias_E, *routing)
    return logits_TE, *choose(logits_TE, bias_E, routing)
