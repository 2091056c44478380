"""Choosing experts on the CPU engine: one call, where ten small torch operations cost a token more than the choice."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Routing

MOST_EXPERTS = 4096
# of a `reference.Routing` in an operator
SCHEMA = (
    "int n_group, int topk_group, int top_k, bool softmax, bool group_score_top2, bool norm_topk_prob, "
    "float scaling_factor"
)


def unsupported_reason(logits: torch.Tensor) -> str | None:
    """Why the engine should not route; ``None`` if it should."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return f"takes fp32 logits on the CPU, found {logits.dtype} on {logits.device}"
    if logits.shape[-1] > MOST_EXPERTS:
        return f"is for up to {MOST_EXPERTS} experts, found {logits.shape[-1]}"
    if torch.is_grad_enabled() and logits.requires_grad:
        return "computes no gradients"
    return _native.unavailable_reason()


def _route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    top_k: int,
    softmax: bool,
    group_score_top2: bool,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        logits: ``[T, E]`` fp32.
        bias: ``[E]`` fp32, added to the scores for the choice alone.
        n_group, ...: as `reference.Routing` has them.

    Returns:
        Weights ``[T, K]`` in fp32 and indices ``[T, K]`` in int64, the best first.

    Raises:
        ValueError: logits or bias of another shape or dtype, or fewer than ``top_k`` experts are eligible.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.shape[1] > MOST_EXPERTS:
        raise ValueError(f"route: found logits {_native.describe(logits)}, wanted [T, E ≤ {MOST_EXPERTS}] in fp32")
    tokens, experts = logits.shape
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32):
        raise ValueError(f"route: found a bias {_native.describe(bias)}, wanted [{experts}] in fp32")
    if not chooses(experts, n_group, topk_group, top_k, group_score_top2):
        by = " by their two best" if group_score_top2 else ""
        raise ValueError(f"route: wanted {top_k} of {experts} experts in {topk_group} of {n_group} groups{by}")
    logits, bias = logits.contiguous(), None if bias is None else bias.contiguous()
    weights, indices = _results(logits, top_k)
    routing = Routing(n_group, topk_group, top_k, softmax, group_score_top2, norm_topk_prob, scaling_factor)
    _native.call(
        "dsm_route",
        *(logits.data_ptr(), tokens, experts, _native.pointer(bias)),
        *(byref(routing), weights.data_ptr(), indices.data_ptr()),
    )
    return weights, indices


def chooses(experts: int, n_group: int, topk_group: int, top_k: int, group_score_top2: bool) -> bool:
    """Whether a router can choose this way among this number of experts."""
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        return False
    of_group = experts // n_group
    return 1 <= top_k <= of_group * topk_group and not (group_score_top2 and n_group > 1 and of_group < 2)


def _results(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


route = define(
    f"route(Tensor logits, Tensor? bias, {SCHEMA}) -> (Tensor, Tensor)",
    _route,
    lambda logits, bias, n_group, topk_group, top_k, *_: _results(logits, top_k),
)
