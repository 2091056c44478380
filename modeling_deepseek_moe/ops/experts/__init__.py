"""Routed experts as one operation: ``out_t = Σ_k weight_tk · down_k(silu(gate_k(x_t)) · up_k(x_t))``.

What it computes is defined in `reference`, expert by expert; `cpu` does a whole layer in one call, on weights that are
FP8, four bits or bf16 and lie stacked, mapped or anywhere in memory; `trained` is the layer with its gradients,
`low_rank` the layer with an adapter's matrices next to its own; `triton` does it on a CUDA card, `grouped` there with
gradients and adapters, `triton_fp8` with products in FP8 while it is trained.
Legend: T tokens, E experts, K experts per token, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_deepseek_moe.ops._dispatch import CPU, TRITON, BackendError, may_use, requested_backend
from modeling_deepseek_moe.ops._library import PLAIN
from modeling_deepseek_moe.ops.experts import cpu, grouped, triton, triton_fp8, unsorted
from modeling_deepseek_moe.ops.experts.cpu import accumulate
from modeling_deepseek_moe.ops.experts.low_rank import (
    Codes,
    Copies,
    LowRank,
    Pair,
    Stacks,
    may_pass_gradients,
    routed_low_rank,
)
from modeling_deepseek_moe.ops.experts.operands import STACKS, Operands, kind_of, operands, unsupported_reason
from modeling_deepseek_moe.ops.experts.reference import Slots, counts, run_experts
from modeling_deepseek_moe.ops.experts.trained import RoutedSwiGlu

__all__ = [
    "IMPLEMENTATION",
    "STACKS",
    "Copies",
    "Implementations",
    "LowRank",
    "Operands",
    "Pair",
    "RoutedSwiGlu",
    "Slots",
    "accumulate",
    "counts",
    "cpu",
    "kind_of",
    "may_run_natively",
    "operands",
    "routed_quantized",
    "routed_swiglu",
    "run_experts",
    "runs_on_card",
    "triton",
    "triton_fp8",
    "unsupported_reason",
]

IMPLEMENTATION = "deepseek_moe"  # the name of `routed_swiglu` among transformers' experts implementations
FEW_TOKENS = 8


class Implementations:
    """transformers' interface of experts implementations, where this package's own is the default.

    It is asked in each call of a layer, where looking the name up among all of them takes as long as a small layer.
    """

    def get_interface(self, name: str | None, default: Callable) -> Callable:
        """The function that ``experts_implementation=name`` stands for; ``default`` for "eager"."""
        if name is None or name == IMPLEMENTATION:
            return routed_swiglu
        return ALL_EXPERTS_FUNCTIONS.get_interface(name, default)


def may_run_natively(
    module: nn.Module, weights: Operands, hidden_TD: torch.Tensor, topk_weights: torch.Tensor
) -> bool:
    """Whether the CPU engine computes this layer of experts for these tokens.

    Raises:
        BackendError: it was asked for by name, and the tokens are on another device.
    """
    if requested_backend() == CPU and hidden_TD.device.type != "cpu":
        raise BackendError(f"routed experts: backend {CPU!r} needs CPU tensors, found {hidden_TD.device}")
    reason = unsupported_reason(module, weights, hidden_TD)
    if reason is None and torch.is_grad_enabled() and topk_weights.requires_grad:
        reason = "computes no gradients"  # the router is being trained, if nothing else is
    return may_use(CPU, reason)


def runs_on_card(reason: str | None) -> bool:
    """Whether the Triton kernels compute a layer of experts, which they cannot for that reason.

    Raises:
        BackendError: they were asked for by name, and cannot.
    """
    if reason is not None and requested_backend() == TRITON:
        raise BackendError(f"routed experts: backend {TRITON!r} {reason}")
    return may_use(TRITON, reason)


def routed_swiglu(
    module: nn.Module,
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """Stacked floating-point experts, ``[T, D]``: the ``experts_implementation`` that the family's models have by default.

    The CPU engine without gradients; on a CPU with them the experts one by one; on a card the Triton kernels, or else
    transformers' own.

    Args:
        module: a `DeepseekExperts`, or one that is parametrised.
        low_rank: what an adapter adds to its stacks.
    """
    device_type = hidden_TD.device.type
    autocast = torch.is_autocast_enabled(device_type)
    if low_rank is not None:
        given = hidden_TD.to(torch.get_autocast_dtype(device_type)) if autocast else hidden_TD
        if runs_on_card(grouped.refuses(module, given, topk_weights)):
            return grouped.run(module, given, topk_indices, topk_weights, low_rank)
        return routed_low_rank(hidden_TD, topk_indices, topk_weights, Stacks(module), low_rank)
    weights = operands(module)
    if not autocast and may_run_natively(module, weights, hidden_TD, topk_weights):
        return cpu.run(hidden_TD, topk_indices, topk_weights, weights)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_TD.dtype
    gate_up, down = weights.stacks[:2]
    given, of_dtype = (hidden_TD.to(dtype), weights._replace(dtype=dtype)) if autocast else (hidden_TD, weights)
    if runs_on_card(triton.refuses(module, of_dtype, given, topk_weights, True)) and not (
        requested_backend() != TRITON and triton.torch_is_faster(of_dtype, given, topk_indices.numel())
    ):
        if triton.needs_gradients(hidden_TD, topk_weights, gate_up, down):
            return grouped.run(module, given, topk_indices, topk_weights, weights=of_dtype)
        return triton.run(given, topk_indices, topk_weights, of_dtype)
    if (
        device_type == "cpu"
        and not torch.compiler.is_compiling()  # how many rows an expert gets is no constant of a graph
        and cpu.is_silu(module.act_fn)
        # else no one asked for weights to be cast to what the hidden states are
        and (autocast or hidden_TD.dtype == gate_up.dtype)
        and all(type(tensor) in PLAIN for tensor in (hidden_TD, gate_up, down))
    ):
        # the grouped kernels run one by one on a CPU too, and copy more for it
        return RoutedSwiGlu.apply(given, topk_indices, topk_weights, gate_up, down, dtype)
    if autocast and gate_up.dtype != dtype:
        # The grouped kernels are no autocast ops: with fp32 weights they would run in fp32 throughout.
        cast = {"gate_up_proj": gate_up.to(dtype), "down_proj": down.to(dtype)}
        return functional_call(module, cast, (given, topk_indices, topk_weights))
    # as `generate` chooses between transformers' two
    few = device_type != "cpu" and len(hidden_TD) <= FEW_TOKENS
    return ALL_EXPERTS_FUNCTIONS["batched_mm" if few else "grouped_mm"](module, hidden_TD, topk_indices, topk_weights)


def routed_quantized(
    module: nn.Module,
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """Experts that stay in a checkpoint's format, ``[T, D]``: the engine, or one expert and one tile at a time.

    Args:
        module: a `QuantizedExperts`.
        low_rank: what an adapter adds to its matrices.
    """
    if low_rank is None:
        weights = operands(module)
        if may_run_natively(module, weights, hidden_TD, topk_weights):
            return cpu.run(hidden_TD, topk_indices, topk_weights, weights)
        if may_use(TRITON, triton.refuses(module, weights, hidden_TD, topk_weights)):
            return triton.run(hidden_TD, topk_indices, topk_weights, weights)
    if runs_on_card(grouped.refuses(module, hidden_TD, topk_weights)):
        return grouped.run(module, hidden_TD, topk_indices, topk_weights, low_rank)
    if low_rank is not None:
        return routed_low_rank(hidden_TD, topk_indices, topk_weights, Codes(module), low_rank)

    if may_pass_gradients(codes := Codes(module), hidden_TD, topk_weights):
        return routed_low_rank(hidden_TD, topk_indices, topk_weights, codes, LowRank())
    if unsorted.may_run(hidden_TD, topk_weights):
        return unsorted.run(module, hidden_TD, topk_indices, topk_weights)

    def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
        return module.expert(module.matrices(index).values(), x_RD)

    return run_experts(hidden_TD, topk_indices, topk_weights, expert, module.num_experts)
