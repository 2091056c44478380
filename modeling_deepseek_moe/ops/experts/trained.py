"""Routed SwiGLU experts with their gradients, in products of one expert at a time: how they train on a CPU.

Nothing is made for all experts at once but what the products write: a weight is cast next to its product, rows are gathered
next to theirs, and of the activations only the products of gate and up are kept for the backward pass.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, S = T·K slots in the experts' order,
R rows routed to one expert.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops.experts.reference import Slots


class RoutedSwiGlu(torch.autograd.Function):
    """``out_t = Σ_k weight_tk · down_k(silu(gate_k(x_t)) · up_k(x_t))``, ``[T, D]`` in ``dtype``.

    The weight of a slot multiplies its SwiGLU, which is narrower than what ``down`` makes of it.

    Args:
        topk_indices: ``[T, K]``; an index of E marks a slot that another expert-parallel rank serves.
        gate_up: ``[E, 2I, D]``; ``down``: ``[E, D, I]``.
        dtype: of the products, to which hidden states and weights are cast.
    """

    @staticmethod
    def forward(ctx, hidden_TD, topk_indices, topk_weights, gate_up, down, dtype):
        ctx.dtypes, hidden_TD = (hidden_TD.dtype, topk_weights.dtype), hidden_TD.to(dtype)
        slots = Slots.of(topk_indices, len(gate_up))
        weights_S = topk_weights.flatten()[slots.order].to(torch.promote_types(dtype, torch.float32)).unsqueeze(1)
        inner_SI = hidden_TD.new_empty((len(slots.order), gate_up.shape[1]))
        y_SD = hidden_TD.new_empty((len(slots.order), hidden_TD.shape[1]))
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for expert, rows, tokens in slots.experts():
                x_RD = hidden_TD.index_select(0, tokens)
                gate, up = torch.mm(x_RD, gate_up[expert].to(dtype).T, out=inner_SI[rows]).chunk(2, dim=1)
                weighted = F.silu(gate).mul_(up).mul_(weights_S[rows])
                torch.mm(weighted, down[expert].to(dtype).T, out=y_SD[rows])
            ctx.save_for_backward(hidden_TD, weights_S, inner_SI, gate_up, down)
            ctx.slots = slots
            return slots.combine(y_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        hidden_TD, weights_S, inner_SI, gate_up, down = ctx.saved_tensors
        slots, dtype = ctx.slots, inner_SI.dtype
        needs_x, _, needs_weights, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        dy_TD = dy_TD.to(dtype).contiguous()
        dx_SD = torch.empty((len(inner_SI), hidden_TD.shape[1]), dtype=dtype) if needs_x else None
        d_weights = torch.zeros_like(weights_S) if needs_weights else None
        d_gate_up = _like(gate_up, slots) if needs_gate_up else None
        d_down = _like(down, slots) if needs_down else None
        with torch.autocast(dy_TD.device.type, enabled=False):
            for expert, rows, tokens in slots.experts():
                gate, up = inner_SI[rows].chunk(2, dim=1)
                silu = F.silu(gate)
                hidden, weight = silu * up, weights_S[rows]
                dy_RD = dy_TD.index_select(0, tokens)
                d_hidden = torch.mm(dy_RD, down[expert].to(dtype))
                if needs_weights:
                    torch.sum(d_hidden * hidden, 1, keepdim=True, dtype=weight.dtype, out=d_weights[rows])
                if needs_down:
                    _product(dy_RD.T, hidden.mul_(weight), d_down[expert])
                if not (needs_x or needs_gate_up):
                    continue
                d_hidden.mul_(weight)
                d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
                d_inner = torch.cat((d_gate, d_hidden.mul_(silu)), dim=1)
                if needs_gate_up:
                    _product(d_inner.T, hidden_TD.index_select(0, tokens), d_gate_up[expert])
                if needs_x:
                    torch.mm(d_inner, gate_up[expert].to(dtype), out=dx_SD[rows])
            dx = slots.combine(dx_SD).to(ctx.dtypes[0]) if needs_x else None
        if needs_weights:
            d_weights = d_weights.flatten()[slots.places].to(ctx.dtypes[1])
        return dx, None, d_weights, d_gate_up, d_down, None


def _like(weight: torch.Tensor, slots: Slots) -> torch.Tensor:
    """An empty gradient, in which experts that were not hit are zero."""
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, count in enumerate(slots.counts):
        if not count:
            gradient[expert] = 0
    return gradient


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
