"""Block-scaled FP8 on a GPU: few rows read the codes once (W8A16), many rows multiply codes with codes (W8A8).

Legend: M rows of x, N output features, K input features.
"""

from functools import partial

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._dispatch import DEEP_GEMM, insists_on, takes
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import blocks, kernels, launch
from modeling_deepseek_moe.ops.block_fp8 import deep_gemm, scaled_mm

FP8_DTYPE = torch.float8_e4m3fn
FEW_ROWS = 64  # up to which gate and up are multiplied in one kernel
MOST_ROWS = 1 << 14  # what is faster for that number is for more
MOST_BLOCKS = (1 << 16) - 1  # on any side of a grid but the first
MANY_ROWS = 256  # from here on, activations are quantised as the releases' recipe has it, on cards that multiply codes


unsupported_reason = _triton.unsupported_reason


def unsupported_weight(weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the kernels cannot use FP8 ``weight`` where it lies; ``None`` if they can."""
    if tuple(block) != (128, 128):
        return f"has blocks of 128 × 128 only, found {tuple(block)}"
    if not weight.is_contiguous() or weight.shape[1] % 4:
        return f"needs contiguous rows of a whole number of words, found {list(weight.shape)}, {weight.stride()}"
    return _triton.unsupported_reason(weight, gradients=True)


def unsupported_dequantize(weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why the kernel cannot decode ``weight``; ``None`` if it can."""
    if tuple(block) != (128, 128):
        return f"has blocks of 128 × 128 only, found {tuple(block)}"
    return unsupported_tile_codes(weight, dtype)


def unsupported_tile_codes(codes: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot decode ``codes`` with a scale for each 1 × 128; ``None`` if it can."""
    if dtype not in _triton.FLOATS:
        return f"decodes to bf16, fp16 and fp32, not {dtype}"
    return _triton.unsupported_reason(codes, gradients=True)


def unsupported_tiles(x: torch.Tensor) -> str | None:
    """Why the kernel cannot quantise ``x``; ``None`` if it can."""
    return _triton.unsupported_reason(x) or _triton.unsupported_floats(x)


def unsupported_linear(x: torch.Tensor, weight: torch.Tensor, block: tuple[int, int]) -> str | None:
    """Why the kernels cannot multiply ``x`` with FP8 ``weight``; ``None`` if they can."""
    reason = _triton.unsupported_reason(x, weight, gradients=True)
    if reason is None and torch.is_autocast_enabled(x.device.type):
        return "does not run under autocast"
    return reason or unsupported_weight(weight, block) or _triton.unsupported_floats(x)


def tile(card: int, rows: int, columns: int, processors: int) -> tuple[int, int, int, int]:
    """Rows of x and of the weight of a program, warps and stages.

    A warp multiplies 16 rows of the weight; smaller blocks than 64 are for weights that would leave processors idle.
    """
    if rows > 64:
        return (128, 128, 8, 3) if card == 90 else (64, 128, 8, 3)
    if rows > 16:
        return (32, 64, 4, 3) if rows <= 32 else (64, 128, 8, 3)
    block = 8 if rows <= 8 else 16
    if columns >= 128 * processors and block == 8:
        return block, 128, 4, 4
    if columns >= 64 * processors:
        return block, 64, 4, 4
    return (block, 32, 2, 4) if columns >= 32 * processors else (block, 16, 1, 4)


def tile_of_two(rows: int, columns: int, processors: int) -> tuple[int, int, int, int]:
    """As `tile`, for gate and up."""
    block_n, warps = (64, 4) if columns >= 64 * processors else (32, 2)
    return (8, block_n, warps, 4) if rows <= 8 else (16, block_n, warps, 3)


def tile_of_codes(card: int) -> tuple[int, int, int, int]:
    """Rows of A and of B of a program, warps and stages."""
    if card == 90:
        return 128, 128, 8, 3
    return (128, 128, 8, 2) if card == 80 else (64, 128, 8, 2)


def _codes(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int32)


def _check(x: torch.Tensor, *matrices: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Before a kernel reads them by address: raise where x, codes and scales do not fit each other."""
    for weight, scale in matrices:
        fits = (
            weight.dtype == FP8_DTYPE
            and weight.ndim == 2
            and weight.is_contiguous()
            and weight.shape[1] % 4 == 0
            and weight.data_ptr() % 4 == 0
            and tuple(scale.shape) == tuple(blocks(n, 128) for n in weight.shape)
            and scale.dtype == torch.float32
            and scale.is_contiguous()
            and x.ndim > 0
            and x.shape[-1] == weight.shape[1]
            and x.dtype in _triton.FLOATS
        )
        if not fits:
            found = (
                f"{x.dtype} {list(x.shape)}, {weight.dtype} {list(weight.shape)}, {scale.dtype} {list(scale.shape)}"
            )
            raise ValueError(
                f"FP8 linear: found activations, codes and scales {found}, wanted [..., K], [N, K] with K % 4 == 0 and fp32 "
                "scales of blocks of 128 × 128"
            )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[M, K]`` whose rows begin at whole words."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows if rows.data_ptr() % 4 == 0 else rows.clone()


def _few(x, weight, scale, bias, second=None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x Wᵀ + bias, and x times another weight, in one launch."""
    rows, n, k = _rows(x), weight.shape[0], weight.shape[1]
    card, processors = _triton.capability(x.device), _triton.processors(x.device)
    n2 = second[0].shape[0] if second is not None else 0
    block_m, block_n, warps, stages = tile(card, len(rows), n + n2, processors)
    y = x.new_empty((*x.shape[:-1], n))
    y2 = x.new_empty((*x.shape[:-1], n2)) if second is not None else None
    others = (_codes(second[0]), second[1], y2) if second is not None else (None, None, None)
    launch(
        kernels("block_fp8").few_rows,
        (blocks(n, block_n) + blocks(n2, block_n), blocks(len(rows), block_m)),
        x.device,
        *(rows, _codes(weight), scale, bias, y, *others, len(rows), n, n2, k),
        **dict(BM=block_m, BN=block_n, BK=128, BIAS=bias is not None, SECOND=second is not None, STAGES=stages),
        warps=warps,
    )
    return y, y2


def _linear(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _check(x, (weight, scale_inv))
    rows, card = x.reshape(-1, x.shape[-1]), _triton.capability(x.device)
    few = len(rows) < MANY_ROWS or card < _triton.FP8_CORES
    if few and not insists_on(DEEP_GEMM):
        return _few(x, weight, scale_inv, bias)[0]
    own = partial(_few, x, weight, scale_inv, None) if few else partial(_many, rows, weight, scale_inv)
    theirs = partial(_by_deep_gemm, rows, weight, scale_inv)

    def find_reason() -> str | None:
        size = _triton.power_of_two(min(len(rows), MOST_ROWS))
        unsupported = deep_gemm.unsupported(card, x, weight)
        return unsupported or deep_gemm.unsuitable(rows, weight, _by_tile, theirs, own, size)

    y = theirs() if takes(DEEP_GEMM, "FP8 linear", find_reason) else _many(rows, weight, scale_inv)
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias.to(y.dtype)


def _many(rows: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    if scaled_mm.unsuitable(rows.device, weight) is None:
        return scaled_mm.multiply(*_by_tile(rows), weight, scale_inv, rows.dtype)
    return _gemm(*_quantize_tiles(rows, False, False), weight, scale_inv, rows.dtype)


def _by_deep_gemm(rows: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    return deep_gemm.multiply(*_by_tile(rows), weight, scale_inv)


def _by_tile(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_tiles(rows, False, False, True)


linear = define(
    "triton_fp8_linear(Tensor x, Tensor weight, Tensor scale_inv, Tensor? bias) -> Tensor",
    None,
    lambda x, weight, scale_inv, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    _linear,
)


def _linear_pair(x, first, first_scale, second, second_scale) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, (first, first_scale), (second, second_scale))
    return _few(x, first, first_scale, None, (second, second_scale))


# Two weights on the same x, in one launch: what a layer's first projections are.
linear_pair = define(
    "triton_fp8_linear_pair(Tensor x, Tensor first, Tensor first_scale, Tensor second, Tensor second_scale) -> (Tensor, Tensor)",
    None,
    lambda x, first, _, second, __: tuple(x.new_empty((*x.shape[:-1], len(weight))) for weight in (first, second)),
    _linear_pair,
)


def _gate_up(x, gate, gate_scale, up, up_scale) -> torch.Tensor:
    _check(x, (gate, gate_scale), (up, up_scale))
    rows, n = _rows(x), gate.shape[0]
    block_m, block_n, warps, stages = tile_of_two(len(rows), n, _triton.processors(x.device))
    h = x.new_empty((*x.shape[:-1], n))
    launch(
        kernels("block_fp8").gate_up,
        (blocks(n, block_n), blocks(len(rows), block_m)),
        x.device,
        *(rows, _codes(gate), gate_scale, _codes(up), up_scale, h, len(rows), n, x.shape[-1]),
        **dict(BM=block_m, BN=block_n, BK=128, STAGES=stages, warps=warps),
    )
    return h


# silu(x Gᵀ) · x Uᵀ in one launch.
gate_up = define(
    "triton_fp8_gate_up(Tensor x, Tensor gate, Tensor gate_scale, Tensor up, Tensor up_scale) -> Tensor",
    None,
    lambda x, gate, *_: x.new_empty((*x.shape[:-1], len(gate))),
    _gate_up,
)


def _dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, rows: int = 128) -> torch.Tensor:
    n, k = weight.shape
    if weight.dtype != FP8_DTYPE or tuple(scale_inv.shape) != (blocks(n, rows), blocks(k, 128)):
        found = f"{weight.dtype} {[n, k]} with scales {list(scale_inv.shape)}"
        raise ValueError(f"FP8 dequantize: found {found}, wanted a scale for {rows} × 128 codes of {FP8_DTYPE}")
    out = weight.new_empty((n, k), dtype=dtype)
    # where they lie: rows of a cache hold both
    codes, scale = (t if t.stride(1) == 1 else t.contiguous() for t in (weight.view(torch.uint8), scale_inv.float()))
    launch(
        kernels("block_fp8").decode_blocks,
        (blocks(n, 32), blocks(k, 128)),
        weight.device,
        *(codes, scale, out, n, k, codes.stride(0), scale.stride(0)),
        **dict(ROWS=rows, BM=32, BK=128),
    )
    return out


# Codes [N, K] with a scale for rows × 128 of them, in a dtype.
dequantize = define(
    "triton_fp8_dequantize(Tensor weight, Tensor scale_inv, ScalarType dtype, int rows=128) -> Tensor",
    None,
    lambda weight, scale_inv, dtype, rows=128: weight.new_empty(weight.shape, dtype=dtype),
    _dequantize,
)


def _quantize_tiles(x, power_of_two: bool, swiglu: bool, by_tile: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _tiles_like(x, power_of_two, swiglu, by_tile)
    k, native = codes.shape[1], _triton.capability(x.device) >= _triton.FP8_CORES
    # rows on the grid's first side, which has no end, would take a twentieth more instructions
    parts = (tensor.split(16 * MOST_BLOCKS) for tensor in (x, codes.view(torch.uint8), scale))
    for rows, rows_codes, rows_scale in zip(*parts, strict=True):
        launch(
            kernels("block_fp8").cast_tiles,
            (blocks(k, 128), blocks(len(rows), 16)),
            x.device,
            *(rows, rows_codes, rows_scale, len(rows), k, *x.stride(), *scale.stride()),
            **dict(BM=16, POWER=power_of_two, SWIGLU=swiglu, NATIVE=native),
        )
    return codes, scale


def _tiles_like(x, power_of_two: bool, swiglu: bool, by_tile: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = x.shape[0], x.shape[1] // (2 if swiglu else 1)
    tiles = blocks(k, 128)
    scale = x.new_empty((tiles, blocks(rows, 4) * 4) if by_tile else (rows, tiles), dtype=torch.float32)
    return x.new_empty((rows, k), dtype=FP8_DTYPE), scale.t()[:rows] if by_tile else scale


# Codes and scales of tiles of 1 × 128 of x [R, K] of any strides: of a transposed x, of tiles of 128 × 1. With ``swiglu``
# those of silu(x[:, :K]) · x[:, K:]; with ``by_tile`` scales lie tile by tile, as cuBLAS wants them.
quantize_tiles = define(
    "triton_fp8_quantize_tiles(Tensor x, bool power_of_two, bool swiglu, bool by_tile=False) -> (Tensor, Tensor)",
    None,
    _tiles_like,
    _quantize_tiles,
)


def _gemm(a, a_scale, b, b_scale, dtype: torch.dtype) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[0]
    block = 128 if b_scale.shape[0] != n else 1
    if a_scale.shape != (m, blocks(k, 128)) or b_scale.shape != (blocks(n, block), blocks(k, 128)) or b.shape[1] != k:
        found = f"{[m, k]} with scales {list(a_scale.shape)} and {list(b.shape)} with scales {list(b_scale.shape)}"
        raise ValueError(f"FP8 gemm: found {found}, wanted a scale for each 1 × 128 of A, and 1 or 128 × 128 of B")
    if block == 128 and m % 4 == 0 and scaled_mm.unsuitable(a.device, b) is None:
        return scaled_mm.multiply(a, a_scale.t().contiguous().t(), b, b_scale.contiguous(), dtype)
    card = _triton.capability(a.device)
    native = card >= _triton.FP8_CORES
    block_m, block_n, warps, stages = tile_of_codes(card)
    out = a.new_empty((m, n), dtype=dtype)
    a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    launch(
        kernels("block_fp8").gemm,
        (blocks(m, block_m) * blocks(n, block_n),),
        a.device,
        *(a, a_scale, b, b_scale, out, m, n, k, *a_scale.stride(), *b_scale.stride()),
        **dict(BM=block_m, BN=block_n, GROUP=8, B_ROWS=block, NATIVE=native, STAGES=stages, warps=warps),
    )
    return out


# A [M, K] · B [N, K]ᵀ of codes, with scales of 1 × 128 of A, and of 1 or 128 × 128 of B, in a dtype.
gemm = define(
    "triton_fp8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType dtype) -> Tensor",
    None,
    lambda a, a_scale, b, b_scale, dtype: a.new_empty((len(a), len(b)), dtype=dtype),
    _gemm,
)
