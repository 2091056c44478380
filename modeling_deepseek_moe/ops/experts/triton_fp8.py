"""Routed SwiGLU experts that train in FP8 on a card: Fprop, Dgrad and Wgrad of all experts in one kernel each.

What they compute is defined expert by expert in `training.fp8_functions`. Nothing is read on the host, whatever the routing is.
Of the activations FP8 codes are kept, the hidden states' once for each token, or all as they are where Wgrad is in bf16.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, S = T·K slots.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import PLAIN_OR_FAKE
from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.block_fp8.triton import FP8_DTYPE, quantize_tiles
from modeling_deepseek_moe.ops.experts.triton_products import (
    Order,
    capability_of,
    combine,
    grouped_outer,
    grouped_product,
    programs,
)
from modeling_deepseek_moe.ops.experts.triton_trained import BF16, weighted_swiglu

TILE = 128


def refuses(hidden_TD: torch.Tensor, *stacks: torch.Tensor) -> str | None:
    """Why these kernels cannot train a layer of experts; ``None`` if they can."""
    reason = _triton.refusal(hidden_TD.device) or _triton.unsupported_floats(hidden_TD)
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return "computes no gradients in graphs"
    for stack in stacks:
        if type(stack) not in PLAIN_OR_FAKE or stack.device != hidden_TD.device:
            return f"needs plain tensors on {hidden_TD.device}, found {type(stack).__name__} on {stack.device}"
    return None


class Stack(NamedTuple):
    """E4M3 codes of every expert's matrices, one above the other, ``[E, H·N, K]``, and scales ``[E, H·⌈N/128⌉, ⌈K/128⌉]``."""

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, halves: int = 1) -> "Stack":
        """``weight``: ``[E, H·N, K]`` of floats. Matrices that are not finite get scales that are NaN."""
        weight = weight.detach().contiguous()
        experts, rows, k = weight.shape
        n, device = rows // halves, weight.device
        codes = torch.empty(weight.shape, dtype=FP8_DTYPE, device=device)
        blocks = experts, halves * _triton.blocks(n, TILE), _triton.blocks(k, TILE)
        scale = torch.empty(blocks, dtype=torch.float32, device=device)
        grid = experts * halves, _triton.blocks(n, TILE), _triton.blocks(k, TILE)
        arguments = weight, codes.view(torch.uint8), scale, n, k
        _triton.launch(_kernels().cast_blocks, grid, device, *arguments, NATIVE=_native(device), warps=8)
        return cls(codes, scale)


class Activation(NamedTuple):
    """``[R, W]`` as it is, or its E4M3 codes with scales of tiles of 1 × 128, ``[R, ⌈W/128⌉]``."""

    values: torch.Tensor
    scale: torch.Tensor | None

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `triton_fp8_kernels.kept` reads it."""
        if self.scale is None:
            return self.values, self.values
        return self.values.view(torch.uint8), self.scale


def _kernels():
    return _triton.kernels("experts", "triton_fp8_kernels")


def _native(device: torch.device) -> bool:
    return capability_of(device) >= _triton.FP8_CORES


def _factors(*codes: torch.Tensor) -> list[torch.Tensor]:
    """As a card multiplies them: as codes, or as bytes that become bf16."""
    return [c if _native(c.device) else c.view(torch.uint8) for c in codes]


def _dgrad(
    a: tuple[torch.Tensor, torch.Tensor], b: Stack, order: Order, halves: int, dtype=torch.float32, **sides: bool
) -> torch.Tensor:
    """``a [R, H·N] · B_e → [S, K]``, the sum over H matrices ``[N, K]`` one above the other.

    Args:
        a: codes and scales, of tiles that begin with each half.
        sides: ``by_token``: ``a`` has a row for each token; ``by_slot``: the result is in the slots' order.
    """
    experts, rows, k = b.codes.shape
    device, tiling = b.codes.device, tiles("grouped_fp8_turned", capability_of(b.codes.device))
    out = torch.empty((len(order.slots), k), dtype=dtype, device=device)
    grid = programs(len(order.slots), experts, tiling.rows), _triton.blocks(k, tiling.columns)
    codes = _factors(a[0], b.codes)
    _triton.launch(
        _kernels().dgrad, grid, device, codes[0], a[1], codes[1], b.scale, *order[:2], out, experts, k, rows // halves,
        TOP_K=order.top_k, HALVES=halves, BY_TOKEN=sides.get("by_token", False), BY_SLOT=sides.get("by_slot", False),
        EXPERTS=_triton.power_of_two(experts), **tiling.constants(), warps=tiling.warps,
    )  # fmt: skip
    return out


def _across(
    x: Activation, order: Order, power_of_two: bool, *, by_token=False, weights=None, swiglu=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[W, P]`` and scales ``[P/128, W]`` of tiles of 128 rows of an expert; P has room for the tiles of any routing."""
    values, scale = x.read()
    experts, device, width = len(order.ends), values.device, values.shape[1] // (2 if swiglu else 1)
    most = programs(len(order.slots), experts, TILE)
    codes = torch.empty((width, TILE * most), dtype=FP8_DTYPE, device=device)
    scales = torch.empty((most, width), dtype=torch.float32, device=device)
    _triton.launch(
        _kernels().cast_across, (most, _triton.blocks(width, 32)), device, values, scale,
        order.slots if weights is None else weights, *order[:2], codes.view(torch.uint8), scales, experts, width, TILE * most,
        TOP_K=order.top_k, BY_TOKEN=by_token, WEIGHTED=weights is not None, SWIGLU=swiglu, POWER=power_of_two,
        NATIVE=_native(device), EXPERTS=_triton.power_of_two(experts), BM=TILE, BN=32,
    )  # fmt: skip
    return codes, scales


def _wgrad(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], order: Order, dtype):
    """``Σ_r a[:, r] · b[:, r]ᵀ`` over each expert's rows, ``[E, N, K]``, of what `_across` made."""
    (n, width), k, experts, device = a[0].shape, len(b[0]), len(order.ends), a[0].device
    tiling, codes = tiles("grouped_fp8_outer", capability_of(device)), _factors(a[0], b[0])
    out = torch.empty((experts, n, k), dtype=dtype, device=device)
    _triton.launch(
        _kernels().wgrad, (experts, _triton.blocks(n, tiling.columns) * _triton.blocks(k, tiling.depth)), device,
        codes[0], a[1], codes[1], b[1], order.ends, out, experts, n, k, width,
        EXPERTS=_triton.power_of_two(experts), **tiling.constants(), warps=tiling.warps,
    )  # fmt: skip
    return out


def _swiglu_backward(inner: Activation, weights, order: Order, d_h, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``inner`` ``[S, 2I]``, and of the weights in fp32, of ``weight · silu(gate) · up``."""
    (slots, width), device = d_h.shape, d_h.device
    d_inner = torch.empty((slots, 2 * width), dtype=dtype, device=device)
    d_weights = torch.zeros(weights.shape, dtype=torch.float32, device=device)
    arguments = *inner.read(), weights, *order[:2], d_h, d_inner, d_weights, len(order.ends), width
    _triton.launch(_kernels().swiglu_backward, (slots,), device, *arguments, BN=1024)
    return d_inner, d_weights


class GroupedFp8SwiGlu(torch.autograd.Function):
    """``out_t = Σ_k weight_tk · down_k(silu(gate_k(x_t)) · up_k(x_t))``, ``[T, D]`` in the dtype of the hidden states, in FP8.

    Args:
        topk_indices: ``[T, K]``; an index of E or more marks a slot that another expert-parallel rank serves.
        gate_up, down: the parameters ``[E, 2I, D]`` and ``[E, D, I]``, for their gradients.
        stacks: their codes.
        fp8_wgrad: Wgrad in FP8; else in bf16.
    """

    @staticmethod
    def forward(
        ctx, hidden_TD, topk_indices, topk_weights, gate_up, down, stacks: tuple[Stack, Stack], fp8_wgrad: bool
    ):
        ctx.dtypes = tuple(t.dtype for t in (hidden_TD, topk_weights, gate_up, down))
        x, indices, weights = hidden_TD.contiguous(), topk_indices.contiguous(), topk_weights.float().contiguous()
        order = Order.of(indices, len(down))
        codes = quantize_tiles(x, fp8_wgrad, False)
        of_gate_up = {"by_token": True, "half": down.shape[2], "dtype": x.dtype}
        inner = grouped_product(codes[0], stacks[0].codes, order, codes[1], stacks[0].scale, **of_gate_up)
        h = quantize_tiles(inner, fp8_wgrad, True)
        of_down = {"by_slot": True, "weights": weights, "dtype": torch.float32}
        y = grouped_product(h[0], stacks[1].codes, order, h[1], stacks[1].scale, **of_down)
        kept = (*codes, *quantize_tiles(inner, True, False)) if fp8_wgrad else (x, None, inner, None)
        ctx.save_for_backward(*kept, indices, weights, *order[:2])
        ctx.stacks, ctx.fp8_wgrad = stacks, fp8_wgrad
        return combine(y, indices, len(down), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x, x_scale, inner, inner_scale, indices, weights, slots, ends = ctx.saved_tensors
        x, inner, order = Activation(x, x_scale), Activation(inner, inner_scale), Order(slots, ends, indices.shape[1])
        needs_x, _, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad[:5]
        gate_up, down = ctx.stacks
        dy = dy_TD.to(ctx.dtypes[0]).contiguous()
        d_x = d_gate_up = d_down = None
        if needs_down:
            d_down = _d_down(dy, inner, weights, order, ctx.dtypes[3], ctx.fp8_wgrad)
        d_h = _dgrad(quantize_tiles(dy, False, False), down, order, 1, by_token=True)
        d_inner, d_weights = _swiglu_backward(inner, weights, order, d_h, ctx.dtypes[0])
        del d_h
        if needs_gate_up:
            d_gate_up = _d_gate_up(d_inner, x, order, ctx.dtypes[2], ctx.fp8_wgrad)
        if needs_x:
            halves = d_inner.view(-1, d_inner.shape[1] // 2)  # gate's and up's have tiles of their own
            d_y = _dgrad(quantize_tiles(halves, False, False), gate_up, order, 2, by_slot=True)
            d_x = combine(d_y, indices, len(ends), ctx.dtypes[0])
        d_weights = d_weights.to(ctx.dtypes[1]) if needs_weights else None
        return d_x, None, d_weights, d_gate_up, d_down, None, None


def _d_down(dy, inner: Activation, weights, order: Order, dtype, fp8_wgrad: bool) -> torch.Tensor:
    if not fp8_wgrad:
        h = weighted_swiglu(inner.values, weights, order)
        return grouped_outer(dy.to(BF16), h, order, a_by_token=True, dtype=dtype)
    a = _across(Activation(dy, None), order, False, by_token=True, weights=weights)
    return _wgrad(a, _across(inner, order, True, swiglu=True), order, dtype)


def _d_gate_up(d_inner, x: Activation, order: Order, dtype, fp8_wgrad: bool) -> torch.Tensor:
    if not fp8_wgrad:
        return grouped_outer(d_inner.to(BF16), x.values.to(BF16), order, b_by_token=True, dtype=dtype)
    a = _across(Activation(d_inner, None), order, False)
    return _wgrad(a, _across(x, order, True, by_token=True), order, dtype)
