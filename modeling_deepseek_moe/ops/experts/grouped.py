"""A layer of experts by `triton_trained`: with gradients of codes, with an adapter, or with gate and up apart.

Legend: T tokens, E experts, K experts per token, D hidden size.
"""

import torch
from torch import nn

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._structs import NESTED
from modeling_deepseek_moe.ops.experts import triton
from modeling_deepseek_moe.ops.experts.low_rank import LowRank
from modeling_deepseek_moe.ops.experts.operands import Operands, operands
from modeling_deepseek_moe.ops.experts.triton_codes import Codes, Matrix
from modeling_deepseek_moe.ops.experts.triton_trained import GroupedSwiGlu, Scales
from modeling_deepseek_moe.ops.four_bit.reference import NestedScales


def refuses(module: nn.Module, hidden_TD: torch.Tensor, topk_weights: torch.Tensor) -> str | None:
    """Why these kernels cannot compute a layer of experts; ``None`` if they can. Stacks are cast where autocast is on.

    Args:
        module: a `DeepseekExperts`, or experts that stay in a checkpoint's format.
        hidden_TD: in the dtype to compute in.
    """
    reason = _triton.refusal(hidden_TD.device)
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return "has no graphs of experts with an adapter, or with gate and up apart"
    weights = _operands(module, hidden_TD)
    if not weights.stacks and hasattr(type(module), "stacked") and module.weight_format.bits == 4:
        return (
            f"takes 4-bit experts whose rows are whole groups, found {module.weight_format.name} rows of other lengths"
        )
    return triton.refuses(module, weights, hidden_TD, topk_weights, with_gradients=True)


def run(
    module: nn.Module,
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    low_rank: LowRank | None = None,
    weights: Operands | None = None,
) -> torch.Tensor:
    """``[T, D]``, differentiable in the hidden states, the weights of the routing, floating-point stacks and the adapter's matrices.

    Args:
        weights: of the module, where they are at hand.
    """
    low_rank = low_rank or LowRank()
    pairs = *low_rank.gate_up, *low_rank.down
    matrices = [matrix for pair in pairs for matrix in (pair.a, pair.b)]
    scales = Scales(len(low_rank.gate_up), [pair.scale for pair in pairs])
    weights = weights or _operands(module, hidden_TD)
    kind = triton.kind(weights)
    if kind is None:
        raise ValueError(f"experts: found {weights.kind or weights.dtype}, which no kernel multiplies")
    if kind == triton.BF16:
        stacks, codes = weights.stacks[:2], None
    else:
        found = module.stacked().values()
        stacks, codes = (None, None), Codes(*(Matrix.of(matrix.codes, matrix.scales, kind) for matrix in found))
    return GroupedSwiGlu.apply(hidden_TD, topk_indices, topk_weights, *stacks, codes, scales, *matrices)


def _operands(module: nn.Module, hidden_TD: torch.Tensor) -> Operands:
    """With stacks where gate and up lie apart too: gate's in the place of both's."""
    weights = operands(module)
    if weights.kind is None and torch.is_autocast_enabled(hidden_TD.device.type) and weights.dtype.is_floating_point:
        return weights if weights.dtype.itemsize == 1 else weights._replace(dtype=hidden_TD.dtype)
    if weights.stacks or weights.kind is None or not hasattr(type(module), "stacked"):
        return weights
    gate, _, down = module.stacked().values()
    scales = (_codes_of(matrix.scales) for matrix in (gate, down))
    return weights._replace(stacks=(gate.codes, down.codes, *scales), kind=weights.kind.removesuffix(NESTED))


def _codes_of(scales) -> torch.Tensor:
    return scales.codes if isinstance(scales, NestedScales) else scales
