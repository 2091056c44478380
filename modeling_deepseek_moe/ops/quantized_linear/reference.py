"""The definition, with a bounded workspace. Legend: N output features, K input features."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

TILE_ELEMENTS = 1 << 20  # weights decoded at a time
DEVICE_TILE_ELEMENTS = (
    1 << 26
)  # on an accelerator, where a launch takes as long as decoding a tile, and memory is larger than a cache


def tiles(n: int, k: int, rows: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of the N rows, whole multiples of ``rows`` each, of at most about `TILE_ELEMENTS` weights."""
    elements = TILE_ELEMENTS if device.type == "cpu" else DEVICE_TILE_ELEMENTS
    step = max(1, elements // max(1, k * rows)) * rows
    return ((start, min(start + step, n)) for start in range(0, n, step))


class QuantizedLinear(torch.autograd.Function):
    """y = x·Wᵀ + b and dx = dy·W, with W decoded tile by tile both times and never kept.

    ``run``, if it is not ``None``, computes y in one go.
    """

    @staticmethod
    def forward(ctx, x, codes, scales, bias, rows, decode, run):
        ctx.save_for_backward(codes, scales)
        ctx.rows, ctx.decode, ctx.features = rows, decode, x.shape[-1]
        if run is not None:
            return run(x, codes, scales, bias)
        y = x.new_empty((*x.shape[:-1], len(codes)))
        for start, end in tiles(len(codes), x.shape[-1], rows, codes.device):
            tile = decode(codes[start:end], scales[start // rows : -(-end // rows)], x.dtype)
            y[..., start:end] = F.linear(x, tile, None if bias is None else bias[start:end].to(x.dtype))
        return y

    @staticmethod
    def backward(ctx, dy):
        codes, scales = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_zeros((*dy.shape[:-1], ctx.features))
            for start, end in tiles(len(codes), ctx.features, ctx.rows, codes.device):
                tile = ctx.decode(codes[start:end], scales[start // ctx.rows : -(-end // ctx.rows)], dy.dtype)
                dx += dy[..., start:end] @ tile
        if ctx.needs_input_grad[3]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, None, None, db, None, None, None
