"""Choosing experts on the CPU engine: one call, where ten small torch operations cost a token more than the choice."""

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define

MOST_EXPERTS = 4096


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
    groups: int,
    kept_groups: int,
    top_k: int,
    softmax: bool,
    best_two: bool,
    normalise: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        logits: ``[T, E]`` fp32.
        bias: ``[E]`` fp32, added to the scores for the choice alone.
        kept_groups: of ``groups`` equal runs of experts; only those of the best groups are eligible.
        softmax: scores are a softmax, else sigmoids.
        best_two: a group counts by the sum of its two best experts, else by its best.
        normalise: weights are divided by their sum; then all are multiplied by ``factor``.

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
    if groups < 1 or experts % groups or not 1 <= top_k <= experts // groups * min(kept_groups, groups):
        raise ValueError(f"route: wanted {top_k} of {experts} experts in {kept_groups} of {groups} groups")
    if kept_groups > groups or (best_two and groups > 1 and experts < 2 * groups):
        raise ValueError(
            f"route: {experts} experts in {groups} groups do not allow {kept_groups} groups by two experts"
        )
    logits, bias = logits.contiguous(), None if bias is None else bias.contiguous()
    weights, indices = _results(logits, top_k)
    _native.call(
        "dsm_route",
        *(logits.data_ptr(), tokens, experts, _native.pointer(bias), groups, kept_groups, top_k),
        *(softmax, best_two, normalise, factor, weights.data_ptr(), indices.data_ptr()),
    )
    return weights, indices


def _results(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


route = define(
    "route(Tensor logits, Tensor? bias, int groups, int kept_groups, int top_k, bool softmax, bool best_two, "
    "bool normalise, float factor) -> (Tensor, Tensor)",
    _route,
    lambda logits, bias, groups, kept_groups, top_k, *_: _results(logits, top_k),
)
