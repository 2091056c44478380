"""Choosing experts on a GPU: one kernel for the logits of a few tokens, one for the choice."""

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import blocks, kernels, launch
from modeling_deepseek_moe.ops.routing.cpu import SCHEMA, chooses

FEW_TOKENS = 16  # above, cuBLAS reads the weight once for all of them
MOST_EXPERTS = 1024


def unsupported_reason(logits: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why the kernel cannot choose; ``None`` if it can."""
    if logits.dtype != torch.float32 or logits.shape[-1] > MOST_EXPERTS:
        return f"takes fp32 logits of up to {MOST_EXPERTS} experts, found {logits.dtype} of {logits.shape[-1]}"
    return _triton.unsupported_reason(logits, bias)


def unsupported_hidden(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel should not compute the logits; ``None`` if it should."""
    reason = _triton.unsupported_reason(hidden, weight)
    if reason is None and hidden.shape[0] > FEW_TOKENS:
        return f"is for up to {FEW_TOKENS} tokens, found {hidden.shape[0]}"
    return reason or _triton.unsupported_floats(hidden) or _triton.unsupported_floats(weight)


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (tokens, features), experts = hidden.shape, weight.shape[0]
    if weight.shape != (experts, features):
        raise ValueError(
            f"route: found states {list(hidden.shape)} and a weight {list(weight.shape)}, wanted one width"
        )
    hidden, weight = hidden.contiguous(), weight.contiguous()
    out = hidden.new_empty((tokens, experts), dtype=torch.float32)
    launch(
        kernels("routing").logits,
        (blocks(experts, 2), tokens),
        hidden.device,
        hidden,
        weight,
        out,
        experts,
        features,
        BE=2,
        BD=1024,
        STAGES=3,
    )
    return out


# hidden [T, D] · weight [E, D]ᵀ in fp32.
logits = define(
    "triton_router_logits(Tensor hidden, Tensor weight) -> Tensor",
    None,
    lambda hidden, weight: hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32),
    _logits,
)


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
    """Arguments, results and errors of `cpu.route`."""
    tokens, experts = logits.shape
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32):
        raise ValueError(f"route: found a bias {bias.dtype} {list(bias.shape)}, wanted [{experts}] in fp32")
    if not chooses(experts, n_group, topk_group, top_k, group_score_top2):
        by = " by their two best" if group_score_top2 else ""
        raise ValueError(f"route: wanted {top_k} of {experts} experts in {topk_group} of {n_group} groups{by}")
    logits, bias = logits.contiguous(), None if bias is None else bias.contiguous()
    weights, indices = _results(logits, top_k)
    of_group = experts // n_group
    launch(
        kernels("routing").route,
        (tokens,),
        logits.device,
        *(logits, bias, weights, indices, experts, scaling_factor),
        **dict(G=n_group, EG=of_group, GP=_triton.power_of_two(n_group), EGP=_triton.power_of_two(of_group), TOPG=topk_group, K=top_k, KP=_triton.power_of_two(top_k)),
        **dict(SOFTMAX=softmax, TOP2=group_score_top2, NORM=norm_topk_prob, BIAS=bias is not None, warps=1),
    )  # fmt: skip
    return weights, indices


def _results(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


route = define(
    f"triton_route(Tensor logits, Tensor? bias, {SCHEMA}) -> (Tensor, Tensor)",
    None,
    lambda logits, bias, n_group, topk_group, top_k, *_: _results(logits, top_k),
    _route,
)
