"""Routed SwiGLU experts with their gradients on a CUDA card, of rows sorted by expert; with low-rank differences next to them.

The experts are bf16 stacks, which may be trained, or codes, which are constant. Nothing is read on the host, whatever the
routing is. Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, r rank, S = T·K slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops.experts.triton_codes import Codes
from modeling_deepseek_moe.ops.experts.triton_products import Order, combine, grouped_outer, grouped_product

BF16 = torch.bfloat16


class Stacks(NamedTuple):
    """A layer's experts in bf16: ``gate_up [E, 2I, D]``, ``down [E, D, I]``."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @property
    def experts(self) -> int:
        return len(self.down)

    def gate_up_product(self, x_TD: torch.Tensor, order: Order) -> torch.Tensor:
        """``[S, 2I]`` in bf16, in the experts' order."""
        return grouped_product(x_TD, self.gate_up, order, by_token=True)

    def down_product(self, h_SI: torch.Tensor, order: Order) -> torch.Tensor:
        """``[S, D]`` in fp32, in the slots' order."""
        return grouped_product(h_SI, self.down, order, by_slot=True, dtype=torch.float32)

    def gate_up_back(self, d_inner_S2I: torch.Tensor, order: Order) -> torch.Tensor:
        """As `down_product`."""
        return grouped_product(d_inner_S2I, self.gate_up, order, turned=True, by_slot=True, dtype=torch.float32)

    def down_back(self, dy_TD: torch.Tensor, order: Order) -> torch.Tensor:
        """``[S, I]`` in bf16, in the experts' order."""
        return grouped_product(dy_TD, self.down, order, turned=True, by_token=True)


class Wanted(NamedTuple):
    """The dtypes of A's gradient and of B's; ``None`` where it is not asked for."""

    a: torch.dtype | None
    b: torch.dtype | None


class Pair(NamedTuple):
    """``a [E, r, M]``, ``b [E, N, r]`` in bf16, and a scale for each slot, ``[S]`` fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor

    def add(self, y: torch.Tensor, x: torch.Tensor, order: Order, *, by_token=False, by_slot=False) -> torch.Tensor:
        """``s · x Aᵀ Bᵀ`` onto ``y [S, N]`` in place; returns ``s · x Aᵀ``, ``[S, r]``. ``x`` has a row for each token ``by_token``."""
        low = grouped_product(x, self.a, order, by_token=by_token, weights=self.scale)
        grouped_product(low, self.b, order, by_slot=by_slot, onto=y)
        return low

    def back(
        self,
        dx: torch.Tensor | None,
        dy,
        x,
        low,
        order: Order,
        wanted: Wanted,
        *,
        x_by_token=False,
        by_token=False,
        by_slot=False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of A and B, where ``wanted``, of ``dy [S, N]``, ``x`` and ``low``; what A hands on goes onto ``dx`` in place.

        Args:
            x_by_token, by_token: ``x``, ``dy`` have a row for each token; by_slot: ``dx`` is in the slots' order.
        """
        d_a = d_b = None
        if dx is not None or wanted.a is not None:
            d_low = grouped_product(dy, self.b, order, turned=True, by_token=by_token, weights=self.scale)
            if dx is not None:
                grouped_product(d_low, self.a, order, turned=True, by_slot=by_slot, onto=dx)
            if wanted.a is not None:
                d_a = grouped_outer(d_low, x, order, b_by_token=x_by_token, dtype=wanted.a)
        if wanted.b is not None:
            d_b = grouped_outer(dy, low, order, a_by_token=by_token, dtype=wanted.b)
        return d_a, d_b


class Scales(NamedTuple):
    """Of the pairs: ``of_inner`` are gate's and up's, which come first; ``values``: a number or ``[T]`` of each."""

    of_inner: int
    values: Sequence[float | torch.Tensor]

    def pairs(
        self, matrices: Sequence[torch.Tensor], slots: torch.Tensor, top_k: int
    ) -> tuple[list[Pair], list[Pair]]:
        """Gate's and up's, and down's, of A and B of one pair after the other."""
        found = []
        for a, b, scale in zip(matrices[::2], matrices[1::2], self.values, strict=True):
            if not isinstance(scale, torch.Tensor):
                each = torch.full(slots.shape, scale, dtype=torch.float32, device=slots.device)
            else:
                each = scale.float().repeat_interleave(top_k) if scale.ndim else scale.float().expand(slots.shape)
            a, b = (m.detach().to(BF16).contiguous() for m in (a, b))
            found.append(Pair(a, b, each))
        return found[: self.of_inner], found[self.of_inner :]


class GroupedSwiGlu(torch.autograd.Function):
    """As `trained.RoutedSwiGlu` and `low_rank.RoutedLowRank`, on a card, products in bf16 and sums in fp32.

    Args:
        topk_indices: ``[T, K]``; an index of E or more marks a slot that another expert-parallel rank serves.
        gate_up: ``[E, 2I, D]``; ``down``: ``[E, D, I]``; both are cast to bf16. ``None`` where there are ``codes``.
        matrices: A and B of one pair after the other, cast to bf16; their gradients have their own dtypes.
    """

    @staticmethod
    def forward(
        ctx, hidden_TD, topk_indices, topk_weights, gate_up, down, codes: Codes | None, scales: Scales, *matrices
    ):
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden_TD, topk_weights, gate_up, down))
        x, indices, weights = (
            hidden_TD.to(BF16).contiguous(),
            topk_indices.contiguous(),
            topk_weights.float().contiguous(),
        )
        base = Stacks(*(stack.to(BF16).contiguous() for stack in (gate_up, down))) if codes is None else codes
        order = Order.of(indices, base.experts)
        of_inner, of_down = scales.pairs(matrices, order.slots, order.top_k)
        inner = base.gate_up_product(x, order)
        lows = [pair.add(inner, x, order, by_token=True) for pair in of_inner]
        h = weighted_swiglu(inner, weights, order)
        y = base.down_product(h, order)
        lows += [pair.add(y, h, order, by_slot=True) for pair in of_down]
        ctx.codes, ctx.scales = codes, scales
        stacks = base if codes is None else ()
        ctx.counts = len(stacks), len(matrices)
        ctx.save_for_backward(x, indices, weights, inner, *order[:2], *stacks, *matrices, *lows)
        return combine(y, indices, base.experts, ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x, indices, weights, inner, *saved = ctx.saved_tensors
        order, saved, (stacks, count) = Order(saved[0], saved[1], indices.shape[1]), saved[2:], ctx.counts
        base = Stacks(*saved[:stacks]) if stacks else ctx.codes
        matrices, lows = saved[stacks : stacks + count], saved[stacks + count :]
        of_inner, of_down = ctx.scales.pairs(matrices, order.slots, order.top_k)
        asked = zip(matrices, ctx.needs_input_grad[7:], strict=True)
        each = [matrix.dtype if needed else None for matrix, needed in asked]
        wanted = [Wanted(*pair) for pair in zip(each[::2], each[1::2], strict=True)]
        needs_x, _, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad[:5]
        dy, d_down, d_gate_up, d_x = dy_TD.to(BF16).contiguous(), None, None, None
        d_h = base.down_back(dy, order)
        h = weighted_swiglu(inner, weights, order) if needs_down or of_down else None
        if needs_down and h is not None:
            d_down = grouped_outer(dy, h, order, a_by_token=True, dtype=ctx.dtypes[3])
        last = zip(of_down, lows[len(of_inner) :], wanted[len(of_inner) :], strict=True)
        d_last = [pair.back(d_h, dy, h, low, order, own, by_token=True) for pair, low, own in last]
        if not (needs_x or needs_weights or needs_gate_up or any(each[: 2 * len(of_inner)])):
            d_matrices = [gradient for pair in d_last for gradient in pair]
            return *(None,) * 4, d_down, None, None, *[None] * (2 * len(of_inner)), *d_matrices
        d_inner, d_weights = _swiglu_backward(inner, weights, order, d_h, base.experts)
        if needs_gate_up:
            d_gate_up = grouped_outer(d_inner, x, order, b_by_token=True, dtype=ctx.dtypes[2])
        d_y = base.gate_up_back(d_inner, order) if needs_x else None
        first = zip(of_inner, lows, wanted, strict=False)
        d_first = [
            pair.back(d_y, d_inner, x, low, order, own, x_by_token=True, by_slot=True) for pair, low, own in first
        ]
        if d_y is not None:
            d_x = combine(d_y, indices, base.experts, ctx.dtypes[0])
        d_weights = d_weights.to(ctx.dtypes[1]) if needs_weights else None
        d_matrices = [gradient for pair in (*d_first, *d_last) for gradient in pair]
        return d_x, None, d_weights, d_gate_up, d_down, None, None, *d_matrices


def weighted_swiglu(inner: torch.Tensor, weights: torch.Tensor, order: Order) -> torch.Tensor:
    """``[S, 2I] → [S, I]``: SwiGLU times the slot's weight, in bf16."""
    slots, width, experts = len(inner), inner.shape[1] // 2, len(order.ends)
    out = torch.empty((slots, width), dtype=BF16, device=inner.device)
    kernel, grid = _triton.kernels("experts", "triton_grouped").swiglu, (slots, _triton.blocks(width, 1024))
    _triton.launch(kernel, grid, inner.device, inner, weights, *order[:2], out, experts, width, BN=1024)
    return out


def _swiglu_backward(inner, weights, order: Order, d_h, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `weighted_swiglu`: the gradients of ``inner``, and of the weights in fp32."""
    d_inner, d_weights = torch.empty_like(inner), torch.zeros(weights.shape, dtype=torch.float32, device=inner.device)
    kernel, width = _triton.kernels("experts", "triton_grouped").swiglu_backward, d_h.shape[1]
    arguments = inner, weights, *order[:2], d_h, d_inner, d_weights, experts, width
    _triton.launch(kernel, (len(inner),), inner.device, *arguments, BN=1024)
    return d_inner, d_weights
