"""The definition of block-scaled FP8 in plain torch, with a bounded workspace.

Legend: N output features, K input features, blocks of bN × bK weights share one scale.
"""

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0
TILE = 128  # values of a row that share a scale, and products that are summed before they are promoted


def decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes → their values in fp16, exactly (fp16 holds every E4M3 value).

    On a CPU this shifts the bits into place, ten times the speed of torch's own cast: the sign-extended byte moved
    up by seven is an fp16 whose exponent is short by 8. Not bf16, whose arithmetic would lose E4M3's subnormals
    in a process that flushes denormals.
    """
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes.to(torch.float16)
    raw = codes.view(torch.int8)
    values = raw.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(0xBF80 - 0x10000).view(torch.float16)
    values.mul_(2.0**8)
    magnitude = raw.bitwise_and(0x7F)
    # 0x7F is NaN, the one pattern that the shift does not map to its value
    if magnitude.numel() and magnitude.max() == 0x7F:
        values.masked_fill_(magnitude == 0x7F, torch.nan)
    return values


@torch.no_grad()
def dequantize(
    weight_NK: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]
) -> torch.Tensor:
    n, k = weight_NK.shape
    values = decode(weight_NK)
    scale_rows = scale_inv.float().repeat_interleave(block[1], dim=1)[:, :k]
    out = torch.empty((n, k), dtype=dtype, device=weight_NK.device)
    # fp16 × fp32 is computed in fp32 and rounded once, into the output: no temporary
    full = n - n % block[0]
    if full:
        blocks = (full // block[0], block[0], k)
        torch.mul(values[:full].view(blocks), scale_rows[: blocks[0], None], out=out[:full].view(blocks))
    if full < n:
        torch.mul(values[full:], scale_rows[-1:], out=out[full:])
    return out


def scales(weight_NK: torch.Tensor, block: tuple[int, int], power_of_two: bool, checked: bool = True) -> torch.Tensor:
    """``checked``: whether to raise for what is not finite, which waits for the device; else its blocks get the scale NaN."""
    blocks = _blocks(weight_NK, block)
    amax = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1)).amax(dim=-1).float()
    if not checked:
        amax = torch.where(torch.isfinite(amax), amax, torch.nan)
    elif not torch.isfinite(amax).all():
        raise ValueError(f"found NaN or Inf (in fp32) in a weight {list(weight_NK.shape)}, wanted finite values")
    scale = amax / E4M3_MAX
    if power_of_two:
        scale = up_to_power_of_two(scale)
    return torch.where(scale == 0, 1.0, scale)  # a block of zeros, or of nothing that fp32 can scale, keeps scale 1


def up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """``2^⌈log2(scale)⌉``, no smaller than fp32's least normal number; zeros and NaN stay."""
    # up to the next one: adding all mantissa bits carries into the exponent unless they were all zero
    bits = scale.clamp_min(torch.finfo(torch.float32).tiny).view(torch.int32)
    return torch.where(scale > 0, ((bits + 0x007FFFFF) & 0x7F800000).view(torch.float32), scale)


def quantize(
    weight_NK: torch.Tensor, block: tuple[int, int], power_of_two: bool, checked: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight_NK.shape
    scale = scales(weight_NK, block, power_of_two, checked)
    blocks = _blocks(weight_NK, block).float() / scale[:, None, :, None]
    codes = blocks.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    return codes[:n, :k].contiguous(), scale


def quantize_with(weight_NK: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    codes = torch.empty(weight_NK.shape, dtype=torch.float8_e4m3fn)
    columns = scale.repeat_interleave(block[1], dim=1)[:, : weight_NK.shape[1]]
    for row in range(scale.shape[0]):
        rows = slice(row * block[0], (row + 1) * block[0])
        values = (weight_NK[rows].float() / columns[row]).clamp_(-E4M3_MAX, E4M3_MAX)
        codes[rows] = values.to(torch.float8_e4m3fn)
    return codes


def _blocks(weight_NK: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``[⌈N/bN⌉, bN, ⌈K/bK⌉, bK]``, zeros beyond the ragged edges."""
    n, k = weight_NK.shape
    pad_n, pad_k = -n % block[0], -k % block[1]
    if pad_n or pad_k:
        weight_NK = F.pad(weight_NK, (0, pad_k, 0, pad_n))
    return weight_NK.reshape((n + pad_n) // block[0], block[0], (k + pad_k) // block[1], block[1])


def quantize_tiles(x_RK: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = x_RK.shape
    x = F.pad(x_RK.float(), (0, -k % TILE)).reshape(rows, -1, TILE)
    scale = x.abs().amax(-1) / E4M3_MAX
    if power_of_two:
        scale = up_to_power_of_two(scale)
    scale = torch.where(scale == 0, 1.0, scale)  # NaN stays: a result that is lost must be seen to be
    codes = (x / scale.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :k].contiguous(), scale


def dequantize_tiles(codes_RK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, k = codes_RK.shape
    values = F.pad(decode(codes_RK).float(), (0, -k % TILE)).view(rows, -1, TILE) * scale.unsqueeze(-1)
    return values.flatten(1)[:, :k].to(dtype)


def gemm(a_MK: torch.Tensor, a_scale: torch.Tensor, b_NK: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    out = a_scale.new_zeros((a_MK.shape[0], b_NK.shape[0]))
    with torch.autocast(out.device.type, enabled=False):
        parts = zip(decode(a_MK).split(TILE, 1), decode(b_NK).split(TILE, 1), strict=True)
        for tile, (a, b) in enumerate(parts):
            partial = a.float() @ b.float().T
            out.addcmul_(partial.mul_(a_scale[:, tile, None]), b_scale[None, :, tile])
    return out
