"""Block-scaled FP8: W = code · weight_scale_inv, one fp32 scale per 128×128 block, ragged at the edges.

The functions check shapes and dtypes and choose a backend; what they compute is defined in `reference`.
"""

import math

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._dispatch import CPU, DEEP_GEMM, TRITON, choose, insists_on, may_use
from modeling_deepseek_moe.ops.block_fp8 import cpu, deep_gemm, reference, triton
from modeling_deepseek_moe.ops.quantized_linear import quantized_linear

FP8_DTYPE = torch.float8_e4m3fn
BLOCK = (128, 128)

__all__ = [
    "BLOCK",
    "FP8_DTYPE",
    "dequantize",
    "dequantize_tiles",
    "gemm",
    "linear",
    "quantize",
    "quantize_tiles",
    "quantize_with",
    "row_scales",
    "scale_shape",
    "scales",
    "triton",
]


def scale_shape(weight_shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a ``[N, K]`` weight: ``[⌈N/block_N⌉, ⌈K/block_K⌉]``."""
    return math.ceil(weight_shape[0] / block[0]), math.ceil(weight_shape[1] / block[1])


def dequantize(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = BLOCK
) -> torch.Tensor:
    """``[N, K]`` E4M3 codes and their fp32 scales → the weight in ``dtype``, rounded once from the fp32 product."""
    _check(weight, scale_inv, block)
    reason = cpu.unsupported_weight(weight, block)
    if reason is None and dtype not in cpu.OUTPUTS:
        reason = f"dequantises to {', '.join(str(output) for output in cpu.OUTPUTS)}, not {dtype}"
    on_a_gpu = triton.unsupported_dequantize(weight, block, dtype)
    backend = choose("FP8 dequantize", {CPU: reason, TRITON: on_a_gpu})
    if backend != "reference":
        return (cpu if backend == CPU else triton).dequantize(weight, scale_inv, dtype)
    return reference.dequantize(weight, scale_inv, dtype, block)


def quantize(
    weight: torch.Tensor, block: tuple[int, int] = BLOCK, power_of_two: bool = False, checked: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[N, K]`` weight → E4M3 codes ``[N, K]`` and fp32 scales, scale = amax(block) / 448, all in fp32.

    Args:
        power_of_two: scale = 2^⌈log2(amax / 448)⌉, as releases with ``scale_fmt: ue8m0`` have them.
        checked: ``False`` where the caller looks for NaN scales later: on an accelerator looking waits for it, and what
            is not finite gets the scale NaN instead of an error.

    Raises:
        ValueError: the weight is not a finite floating-point matrix.
    """
    _check_float(weight)
    if choose("FP8 quantize", {CPU: cpu.unsupported_values(weight, block)}) == CPU:
        return cpu.quantize(weight.detach(), True, power_of_two)
    return reference.quantize(weight, block, power_of_two, checked or weight.device.type == "cpu")


def scales(weight: torch.Tensor, block: tuple[int, int] = BLOCK, power_of_two: bool = False) -> torch.Tensor:
    """The scales of `quantize` alone."""
    _check_float(weight)
    if choose("FP8 scales", {CPU: cpu.unsupported_values(weight, block)}) == CPU:
        return cpu.quantize(weight.detach(), False, power_of_two)[1]
    return reference.scales(weight, block, power_of_two)


def quantize_with(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """The E4M3 codes ``[N, K]`` that are nearest to a weight ``[N, K]`` with these scales."""
    _check_float(weight)
    return reference.quantize_with(weight, scale_inv, block)


def quantize_tiles(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[R, K]`` matrix → E4M3 codes ``[R, K]`` and fp32 scales ``[R, ⌈K/128⌉]`` of its tiles of 1 × 128.

    scale = amax(tile) / 448, 1 for a tile of zeros. NaN and Inf make their tile NaN.

    Args:
        power_of_two: round scales up to powers of two, so that tiles can be cut again (1 × 128 to 128 × 1) with next to
            no further error.
    """
    _check_float(x)
    if may_use(TRITON, triton.unsupported_tiles(x)):
        return triton.quantize_tiles(x, power_of_two, False)
    return reference.quantize_tiles(x, power_of_two)


def dequantize_tiles(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values ``[R, K]`` of what `quantize_tiles` made."""
    if may_use(TRITON, triton.unsupported_tile_codes(codes, dtype)):
        return triton.dequantize(codes, scale, dtype, 1)
    return reference.dequantize_tiles(codes, scale, dtype)


def row_scales(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales of 128 × 128 blocks ``[⌈N/128⌉, ⌈K/128⌉]`` as those of 1 × 128 tiles ``[N, ⌈K/128⌉]``."""
    return scale.repeat_interleave(BLOCK[0], dim=0)[:rows]


def gemm(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """``A [M, K] · B [N, K]ᵀ → [M, N]`` fp32 of codes with a scale for every 1 × 128 tile of a row.

    As the V3 report, 3.3.2: the products of 128 codes are summed, multiplied by both scales, and added up in fp32. What
    a tensor core loses within those 128 is not imitated: they are summed in fp32.

    Args:
        a_scale: ``[M, ⌈K/128⌉]`` fp32; ``b_scale`` likewise, or of blocks of 128 × 128, ``[⌈N/128⌉, ⌈K/128⌉]``.

    Raises:
        ValueError: codes or scales of other shapes.
    """
    of_blocks = b_scale.shape[0] != b.shape[0]
    for name, codes, scale in (("A", a, a_scale), ("B", b, b_scale)):
        rows = scale_shape(codes.shape)[0] if name == "B" and of_blocks else codes.shape[0]
        wanted = (rows, math.ceil(codes.shape[1] / BLOCK[1]))
        if codes.dtype != FP8_DTYPE or tuple(scale.shape) != wanted:
            found = f"{codes.dtype} {list(codes.shape)} with scales {list(scale.shape)}"
            raise ValueError(f"FP8 gemm: {name} is {found}, wanted {FP8_DTYPE} with scales {list(wanted)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"FP8 gemm: found K of {a.shape[1]} and {b.shape[1]}, wanted one K")
    if may_use(TRITON, triton.unsupported_reason(a, a_scale, b, b_scale)):
        return triton.gemm(a, a_scale, b, b_scale, torch.float32)
    return reference.gemm(a, a_scale, b, row_scales(b_scale, len(b)) if of_blocks else b_scale)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    bias: torch.Tensor | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """``x [..., K] · Wᵀ + bias → [..., N]`` in ``x.dtype``; W is dequantised a tile of rows at a time.

    Differentiable in ``x`` and ``bias``; the codes and scales are constants. On cards from SM89 on, 256 rows of x or more are
    quantised in tiles of 1 × 128 first, as the releases' recipe has it (``activation_scheme: dynamic``).
    """
    _check(weight, scale_inv, block)
    if not x.ndim or x.shape[-1] != weight.shape[1]:
        features = x.shape[-1] if x.ndim else "no"
        raise ValueError(f"input has {features} features, the weight {list(weight.shape)} wants {weight.shape[1]}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != x.device):
        found = f"{list(bias.shape)} on {bias.device}"
        raise ValueError(f"bias has shape {found}, wanted [{weight.shape[0]}] on {x.device}")
    reason = cpu.unsupported_weight(weight, block) or cpu.unsupported_activations(x)
    on_card = triton.unsupported_linear(x, weight, block)
    reasons = {CPU: reason, TRITON: on_card}
    if insists_on(DEEP_GEMM):  # else it is asked where its times are taken: next to the kernels
        reasons[DEEP_GEMM] = on_card or deep_gemm.unsupported(_triton.capability(x.device), x, weight)
    backend = choose("FP8 linear", reasons)
    if backend != "reference":
        native = cpu if backend == CPU else triton
        needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
        if not (torch.is_grad_enabled() and needs_grad):
            return native.linear(x, weight, scale_inv, bias)
        return quantized_linear(x, weight, scale_inv, bias, block[0], native.dequantize, native.linear)

    def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return reference.dequantize(codes, scales, dtype, block)

    return quantized_linear(x, weight, scale_inv, bias, block[0], dequantize)


def _check_float(weight: torch.Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"found {weight.dtype} {list(weight.shape)}, wanted a floating-point matrix to quantise")


def _check(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> None:
    if weight.dtype != FP8_DTYPE or weight.ndim != 2:
        raise ValueError(f"weight must be a {FP8_DTYPE} matrix, found {weight.dtype} {list(weight.shape)}")
    wanted = scale_shape(weight.shape, block)
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(f"weight_scale_inv has shape {list(scale_inv.shape)}, wanted {list(wanted)}")
    if scale_inv.device != weight.device:
        raise ValueError(f"weight_scale_inv is on {scale_inv.device}, wanted it on {weight.device}, as the weight")
