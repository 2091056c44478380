"""Routed SwiGLU experts with their gradients on a CUDA card, of rows sorted by expert.

Nothing is read on the host, whatever the routing is. Legend: T tokens, E experts, K experts per token, D hidden size,
I expert width, S = T·K slots.
"""

import torch
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops.experts.triton_products import Order, combine, grouped_outer, grouped_product


class GroupedSwiGlu(torch.autograd.Function):
    """As `trained.RoutedSwiGlu`, on a card, in bf16: ``out_t = Σ_k weight_tk · down_k(silu(gate_k x_t) · up_k x_t)``.

    Args:
        topk_indices: ``[T, K]``; an index of E or more marks a slot that another expert-parallel rank serves.
        gate_up: ``[E, 2I, D]``; ``down``: ``[E, D, I]``; both are cast to bf16.
    """

    @staticmethod
    def forward(ctx, hidden_TD, topk_indices, topk_weights, gate_up, down):
        ctx.dtypes = hidden_TD.dtype, topk_weights.dtype, gate_up.dtype, down.dtype
        x, gate_up, down = (tensor.to(torch.bfloat16).contiguous() for tensor in (hidden_TD, gate_up, down))
        indices, weights = topk_indices.contiguous(), topk_weights.float().contiguous()
        order = Order.of(indices, len(gate_up))
        inner = grouped_product(x, gate_up, order, by_token=True)
        y = grouped_product(_weighted(inner, weights, order), down, order, by_slot=True, dtype=torch.float32)
        ctx.save_for_backward(x, indices, weights, inner, gate_up, down, *order[:2])
        return combine(y, indices, len(gate_up), ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x, indices, weights, inner, gate_up, down, sorted_slots, ends = ctx.saved_tensors
        order, count, width = Order(sorted_slots, ends, indices.shape[1]), len(gate_up), down.shape[2]
        needs_x, _, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad
        dy = dy_TD.to(torch.bfloat16).contiguous()
        d_down = d_gate_up = d_x = None
        if needs_down:
            d_down = grouped_outer(dy, _weighted(inner, weights, order), order, a_by_token=True, dtype=ctx.dtypes[3])
        d_h = grouped_product(dy, down, order, turned=True, by_token=True)
        d_inner = torch.empty_like(inner)
        d_weights = torch.zeros(weights.shape, dtype=torch.float32, device=x.device)
        _triton.launch(
            _triton.kernels("experts", "triton_grouped").swiglu_backward, (len(inner),), x.device,
            inner, weights, *order[:2], d_h, d_inner, d_weights, count, width, BN=1024,
        )  # fmt: skip
        if needs_gate_up:
            d_gate_up = grouped_outer(d_inner, x, order, b_by_token=True, dtype=ctx.dtypes[2])
        if needs_x:
            d_y = grouped_product(d_inner, gate_up, order, turned=True, by_slot=True, dtype=torch.float32)
            d_x = combine(d_y, indices, count, ctx.dtypes[0])
        return d_x, None, d_weights.to(ctx.dtypes[1]) if needs_weights else None, d_gate_up, d_down


def _weighted(inner: torch.Tensor, weights: torch.Tensor, order: Order) -> torch.Tensor:
    """``[S, 2I] → [S, I]``: SwiGLU times the slot's weight, in bf16."""
    slots, width, experts = len(inner), inner.shape[1] // 2, len(order.ends)
    out = torch.empty((slots, width), dtype=torch.bfloat16, device=inner.device)
    kernel, grid = _triton.kernels("experts", "triton_grouped").swiglu, (slots, _triton.blocks(width, 1024))
    _triton.launch(kernel, grid, inner.device, inner, weights, *order[:2], out, experts, width, BN=1024)
    return out
