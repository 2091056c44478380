"""Fprop, Dgrad and Wgrad in FP8 with their gradients (DeepSeek-V3 report, 3.3): linear layers and SwiGLU.

Activations and gradients are quantised in tiles of 1 × 128 along the sum, weights in blocks of 128 × 128, all with scales
of the moment. What Wgrad needs is kept in FP8: the input, and for SwiGLU its input, from which its output is made again.

Legend: R rows (tokens), N output features, K input features, I width of a SwiGLU, E experts.
"""

from typing import NamedTuple

import torch

from modeling_deepseek_moe.ops import block_fp8


class Fp8Weight(NamedTuple):
    """E4M3 codes ``[N, K]`` and fp32 scales of their 128 × 128 blocks."""

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Fp8Weight":
        return cls(*block_fp8.quantize(weight.detach(), checked=False))

    def fprop(self, x: "Kept") -> torch.Tensor:
        """``x [R, K] · Wᵀ → [R, N]`` fp32."""
        return block_fp8.gemm(x.codes, x.scale, self.codes, self.scale)

    def dgrad(self, dy: torch.Tensor) -> torch.Tensor:
        """``dy [R, N] · W → [R, K]`` fp32."""
        return block_fp8.gemm(*block_fp8.quantize_tiles(dy), self.codes.T.contiguous(), self.scale.T)


class Kept(NamedTuple):
    """An activation ``[R, K]``: in FP8 for Fprop, and what is kept of it for Wgrad.

    ``exact`` is the activation itself where Wgrad is in bf16. Where it is in FP8 the tiles are cut again across the rows, and
    scales are powers of two.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    exact: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, fp8_wgrad: bool) -> "Kept":
        return cls(*block_fp8.quantize_tiles(x, power_of_two=fp8_wgrad), None if fp8_wgrad else x)

    def saved(self) -> tuple[torch.Tensor | None, ...]:
        return (self.codes, self.scale, None) if self.exact is None else (None, None, self.exact)

    def rows(self, start: int, end: int) -> "Kept":
        return Kept(*(None if part is None else part[start:end] for part in self))

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The activation as Wgrad and SwiGLU's backward pass see it."""
        return block_fp8.dequantize_tiles(self.codes, self.scale, dtype) if self.exact is None else self.exact


def wgrad(dy: torch.Tensor, x: torch.Tensor, fp8: bool) -> torch.Tensor:
    """``dyᵀ [N, R] · x [R, K] → [N, K]`` fp32; in FP8 with tiles along the rows, else of bf16 operands."""
    if not fp8:
        with torch.autocast(dy.device.type, enabled=False):
            return dy.bfloat16().float().T @ x.bfloat16().float()
    return block_fp8.gemm(*block_fp8.quantize_tiles(dy.T), *block_fp8.quantize_tiles(x.T, power_of_two=True))


class Fp8LinearFunction(torch.autograd.Function):
    """``x [..., K] · Wᵀ → [..., N]`` in the dtype of ``x``; ``quantized`` are the codes of ``weight``."""

    @staticmethod
    def forward(ctx, x, weight, quantized: Fp8Weight, fp8_wgrad: bool):
        kept = Kept.of(x.reshape(-1, x.shape[-1]), fp8_wgrad)
        ctx.save_for_backward(*kept.saved(), *quantized)
        ctx.shape, ctx.dtype, ctx.weight_dtype, ctx.fp8_wgrad = x.shape, x.dtype, weight.dtype, fp8_wgrad
        return quantized.fprop(kept).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        *kept, codes, scale = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = Fp8Weight(codes, scale).dgrad(dy).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = wgrad(dy, Kept(*kept).values(torch.float32), ctx.fp8_wgrad).to(ctx.weight_dtype)
        return dx, dw, None, None


class Fp8SwiGluFunction(torch.autograd.Function):
    """``down(silu(gate(x)) · up(x))`` of E experts, ``x [R, K] → [R, K]`` in the dtype of ``x``.

    Args:
        gate_up, down: the parameters, for their gradients: ``gate_up [E, 2I, K]`` and ``down [E, K, I]``.
        quantized: gate, up and down of each expert.
        counts: rows of each expert; they lie in the experts' order.
    """

    @staticmethod
    def forward(ctx, x, gate_up, down, quantized: list[tuple[Fp8Weight, ...]], counts: list[int], fp8_wgrad: bool):
        kept = Kept.of(x, fp8_wgrad)
        inner = x.new_empty((len(x), gate_up.shape[1]))
        y = torch.empty_like(x)
        for (gate, up, down_weight), start, end in _hit(quantized, counts):
            rows = kept.rows(start, end)
            inner[start:end] = torch.cat((gate.fprop(rows), up.fprop(rows)), dim=1)
            hidden = _swiglu(inner[start:end])
            y[start:end] = down_weight.fprop(Kept.of(hidden, fp8_wgrad))
        inner = Kept.of(inner, fp8_wgrad)
        ctx.save_for_backward(*kept.saved(), *inner.saved(), gate_up, down)
        ctx.quantized, ctx.counts, ctx.fp8_wgrad, ctx.dtype = quantized, counts, fp8_wgrad, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        kept, inner, (gate_up, down) = Kept(*saved[:3]), Kept(*saved[3:6]), saved[6:]
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        dx = torch.empty(dy.shape, dtype=ctx.dtype, device=dy.device) if needs_x else None
        d_gate_up = torch.zeros_like(gate_up) if needs_gate_up else None
        d_down = torch.zeros_like(down) if needs_down else None
        for expert, (weights, start, end) in enumerate(_all(ctx.quantized, ctx.counts)):
            if start == end:
                continue
            gate, up, down_weight = weights
            rows = inner.rows(start, end).values(torch.float32)
            d_inner = _swiglu_backward(rows, down_weight.dgrad(dy[start:end])).to(ctx.dtype)
            if needs_down:
                d_down[expert] = wgrad(dy[start:end], _swiglu(rows).to(ctx.dtype), ctx.fp8_wgrad)
            if needs_gate_up:
                x = kept.rows(start, end).values(torch.float32)
                halves = [wgrad(half, x, ctx.fp8_wgrad) for half in d_inner.chunk(2, dim=1)]
                d_gate_up[expert] = torch.cat(halves)
            if needs_x:
                d_gate, d_up = d_inner.chunk(2, dim=1)
                dx[start:end] = gate.dgrad(d_gate) + up.dgrad(d_up)
        return dx, d_gate_up, d_down, None, None, None


def _all(quantized, counts):
    start = 0
    for weights, count in zip(quantized, counts, strict=True):
        yield weights, start, start + count
        start += count


def _hit(quantized, counts):
    return (found for found in _all(quantized, counts) if found[1] < found[2])


def _swiglu(inner_R2I: torch.Tensor) -> torch.Tensor:
    gate, up = inner_R2I.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def _swiglu_backward(inner_R2I: torch.Tensor, d_hidden: torch.Tensor) -> torch.Tensor:
    gate, up = inner_R2I.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, d_hidden * gate * sigmoid), dim=1)
