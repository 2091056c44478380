"""The definition of block-scaled FP8 in plain torch, with a bounded workspace.

Legend: N output features, K input features, blocks of bN × bK weights share one scale.
"""

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0
TILE_ELEMENTS = 1 << 20  # weights dequantised at a time by `BlockFp8Linear`


def decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes → their values in bf16, exactly (bf16 holds every E4M3 value).

    On a CPU this shifts the bits into place, nine times the speed of torch's own cast: the sign-extended byte
    moved up by four is a bf16 whose exponent is short by 120.
    """
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes.to(torch.bfloat16)
    raw = codes.view(torch.int8)
    values = raw.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000).view(torch.bfloat16)
    values.mul_(2.0**120)
    nan = raw.bitwise_and(0x7F).eq_(0x7F)  # the one pattern that the shift does not map to its value
    return values.masked_fill_(nan.bool(), torch.nan) if nan.any() else values


def dequantize(
    weight_NK: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]
) -> torch.Tensor:
    n, k = weight_NK.shape
    values = decode(weight_NK)
    scale_rows = scale_inv.float().repeat_interleave(block[1], dim=1)[:, :k]
    out = torch.empty((n, k), dtype=dtype, device=weight_NK.device)
    full = n - n % block[0]
    if full:
        whole = values[:full].view(-1, block[0], k) * scale_rows[: full // block[0], None]
        out[:full].view(-1, block[0], k).copy_(whole)
    if full < n:
        out[full:].copy_(values[full:] * scale_rows[-1:])
    return out


def quantize(weight_NK: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight_NK.shape
    pad_n, pad_k = -n % block[0], -k % block[1]
    blocks = F.pad(weight_NK.float(), (0, pad_k, 0, pad_n))
    blocks = blocks.view((n + pad_n) // block[0], block[0], (k + pad_k) // block[1], block[1])
    amax = blocks.abs().amax(dim=(1, 3))
    if not torch.isfinite(amax).all():
        raise ValueError(f"cannot quantise a weight {[n, k]} that holds NaN or Inf")
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))  # a block of zeros keeps scale 1
    codes = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(n + pad_n, k + pad_k)[:n, :k].contiguous(), scale


def tiles(n: int, k: int, block_n: int):
    """Row ranges, whole blocks each, of at most about `TILE_ELEMENTS` weights."""
    rows = max(1, TILE_ELEMENTS // (k * block_n)) * block_n
    return ((start, min(start + rows, n)) for start in range(0, n, rows))


class BlockFp8Linear(torch.autograd.Function):
    """y = x·Wᵀ + b and dx = dy·W, with W dequantised tile by tile both times and never kept."""

    @staticmethod
    def forward(ctx, x, weight_NK, scale_inv, bias, block):
        ctx.save_for_backward(weight_NK, scale_inv)
        ctx.block = block
        n, k = weight_NK.shape
        y = x.new_empty((*x.shape[:-1], n))
        for start, end in tiles(n, k, block[0]):
            tile = _tile(weight_NK, scale_inv, start, end, x.dtype, block)
            part = F.linear(x, tile, None if bias is None else bias[start:end].to(x.dtype))
            y[..., start:end] = part
        return y

    @staticmethod
    def backward(ctx, dy):
        weight_NK, scale_inv = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            n, k = weight_NK.shape
            dx = dy.new_zeros((*dy.shape[:-1], k))
            for start, end in tiles(n, k, ctx.block[0]):
                dx += dy[..., start:end] @ _tile(weight_NK, scale_inv, start, end, dy.dtype, ctx.block)
        if ctx.needs_input_grad[3]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, None, None, db, None


def _tile(weight_NK, scale_inv, start, end, dtype, block):
    return dequantize(weight_NK[start:end], scale_inv[start // block[0] : -(-end // block[0])], dtype, block)
