"""Routed experts of a few tokens on a CUDA card with what follows them: shared experts' part, the residual, and the next norm."""

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops.experts.triton import joins, slot_results

MOST_FEATURES = 1 << 14  # a row is held in registers


def unsupported_reason(residual: torch.Tensor, norm: torch.Tensor) -> str | None:
    """Why the kernel cannot end a layer so; ``None`` if it can. Of the experts themselves `experts.triton.refuses` says it."""
    if residual.shape[-1] > MOST_FEATURES or norm.shape != residual.shape[-1:] or norm.dtype != residual.dtype:
        return f"is for up to {MOST_FEATURES} features and a norm of their dtype, found {list(residual.shape)}, {norm.dtype}"
    return _triton.unsupported_reason(residual, norm)


def _experts_and_norm(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    name: str,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    joined: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        hidden, ..., name: as `experts.triton.experts` has them.
        shared: ``[T, D]``, what shared experts add; ``residual [T, D]``, what both are added to; ``norm [D]``, a weight.
        joined: in place of ``shared``, the shared experts' own weights, as `slot_results` takes them; or none.

    Returns:
        The sum ``[T, D]``, and its norm.
    """
    if residual.shape != hidden.shape or (shared is not None and shared.shape != hidden.shape):
        found = f"{list(hidden.shape)}, {None if shared is None else list(shared.shape)} and {list(residual.shape)}"
        raise ValueError(f"experts_and_norm: found states, shared part and residual {found}, wanted one shape")
    if joined and (shared is not None or not joins(name, indices.numel()) or not _fit(joined, hidden, gate_up)):
        found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in joined)
        raise ValueError(
            f"experts_and_norm: found shared experts {found} that do not fit {name} experts of {hidden.shape[1]}"
        )
    y = slot_results(hidden, indices, weights, (gate_up, down, gate_up_scale, down_scale), name, joined)
    total, out = (torch.empty_like(residual, memory_format=torch.contiguous_format) for _ in range(2))
    (tokens, size), top_k = hidden.shape, indices.shape[1]
    shared = y[indices.numel() :] if joined else (None if shared is None else shared.contiguous())
    _triton.launch(
        _triton.kernels("moe").combine_and_norm, (tokens,), hidden.device,
        y, indices.contiguous(), shared, residual.contiguous(), norm, total, out, len(down), size, eps,
        TOP_K=top_k, DP=_triton.power_of_two(size), SHARED=shared is not None, warps=8 if size > 2048 else 4,
    )  # fmt: skip
    return total, out


def _fit(joined: list[torch.Tensor], hidden: torch.Tensor, stack: torch.Tensor) -> bool:
    """Whether gate, up and down, and their scales, are contiguous, of the stack's dtype, and of shapes that fit each other."""
    scales, (width, size) = joined[3:], joined[0].shape
    blocks = (_triton.blocks(width, 128), _triton.blocks(size, 128))
    shapes = [(width, size), (width, size), (size, width), blocks, blocks, blocks[::-1]][: len(joined)]
    return (
        size == hidden.shape[1]
        and [tuple(tensor.shape) for tensor in joined] == shapes
        and all(tensor.is_contiguous() for tensor in joined)
        and all(tensor.dtype == stack.dtype for tensor in joined[:3])
        and len(scales) == (3 if stack.dtype == torch.float8_e4m3fn else 0)
        and all(scale.dtype == torch.float32 for scale in scales)
        and width % 4 == 0
    )


experts_and_norm = define(
    "experts_and_norm_on_card(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor? gate_up_scale, Tensor? down_scale, str name, Tensor? shared, Tensor residual, Tensor norm, float eps,"
    " Tensor[] joined)"
    " -> (Tensor, Tensor)",
    None,
    lambda hidden, *_: (hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)),
    cuda=_experts_and_norm,
)
