"""Four-bit linear layers on a GPU: codes and scales used as they lie in memory, one kernel for all kinds.

Legend: M rows of x, N output features, K input features.
"""

from functools import cache
from typing import Any

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import blocks, kernels, launch
from modeling_deepseek_moe.ops.four_bit.cpu import scales_of
from modeling_deepseek_moe.ops.four_bit.reference import KINDS, NestedScales

OUTPUTS = _triton.FLOATS
FEW_ROWS = 64  # above, the weight is decoded once for a product of cuBLAS
Scales = torch.Tensor | NestedScales


def unsupported_codes(kind: str, codes: torch.Tensor, scales: Scales, block: tuple[int, int]) -> str | None:
    """Why the kernels cannot use a four-bit matrix where it lies; ``None`` if they can."""
    if tuple(block) != (1, KINDS[kind].group):
        return f"has groups of {KINDS[kind].group} columns only for {kind}, found {tuple(block)}"
    tensors = codes, *(scales if isinstance(scales, NestedScales) else (scales,))
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "needs contiguous codes and scales"
    return _triton.unsupported_reason(*tensors)


def unsupported_linear(x: torch.Tensor) -> str | None:
    """Why the kernels cannot multiply with ``x``; ``None`` if they can."""
    reason = _triton.unsupported_reason(x, gradients=True)
    if reason is None and torch.is_autocast_enabled(x.device.type):
        return "does not run under autocast"
    return reason or _triton.unsupported_floats(x)


def tile(rows: int, columns: int, processors: int) -> tuple[int, int, int, int]:
    """Rows of x and of the weight of a program, warps and stages."""
    if rows > 8:
        return 32, 64, 4, 3
    return (8, 64, 4, 3) if columns >= 64 * processors else (8, 32, 2, 3)


def tile_of_groups(rows: int, columns: int, processors: int) -> tuple[int, int, int, int]:
    """As `tile`, for rows in bf16: each warp takes a group of codes of all the rows of the weight."""
    if rows > 8:
        return 16 if rows <= 16 else 32, 64, 4, 3
    if columns >= 128 * processors:
        return 8, 128, 4, 3
    return (8, 64, 4, 4) if columns >= 64 * processors else (8, 32, 4, 4)


@cache
def _table(kind: str, device: torch.device) -> torch.Tensor:
    """The sixteen values on a device; a constant, made once."""
    return torch.tensor(KINDS[kind].values, device=device)


def _operands(kind: str, codes: torch.Tensor, parts: list[torch.Tensor]) -> tuple[tuple, dict, int]:
    """The kernels' arguments for a matrix, their constants, and K."""
    scales, code = scales_of(parts), KINDS[kind]
    first = scales.codes if isinstance(scales, NestedScales) else scales
    columns = 2 * codes.shape[-1] * codes.element_size()
    if codes.ndim != 2 or tuple(first.shape) != (codes.shape[0], columns // code.group) or columns % code.group:
        found = f"codes {codes.dtype} {list(codes.shape)} and scales {list(first.shape)}"
        raise ValueError(f"four-bit linear: {kind}: found {found}, wanted a scale for {code.group} columns of a row")
    form = "nested" if isinstance(scales, NestedScales) else "plain"
    if first.dtype in (torch.uint8, torch.float8_e8m0fnu) and form == "plain":
        form, first = "e8m0", first.view(torch.uint8)
    rest = scales[1:] if isinstance(scales, NestedScales) else (None, None, None)
    by_table = kind != "int4"
    constants = {"GROUP": code.group, "TABLE": by_table, "LOW_FIRST": code.low_first, "SCALES": form}
    table = _table(kind, codes.device) if by_table else None
    return (codes.view(torch.int32), first, *rest, table), constants, columns


def _linear(x, codes, scales: list[torch.Tensor], bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    operands, constants, columns = _operands(kind, codes, scales)
    if not x.ndim or x.shape[-1] != columns or x.dtype not in _triton.FLOATS:
        raise ValueError(f"four-bit linear: found activations {x.dtype} {list(x.shape)}, wanted [..., {columns}]")
    rows, n = x.reshape(-1, columns).contiguous(), codes.shape[0]
    if len(rows) > FEW_ROWS:
        weight = _dequantize(codes, scales, x.dtype, kind)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = x.new_empty((*x.shape[:-1], n))
    if x.dtype == torch.bfloat16:
        _few_bf16_rows(rows, operands, bias, y, n, kind, constants["SCALES"])
        return y
    block_m, block_n, warps, stages = tile(len(rows), n, _triton.processors(x.device))
    launch(
        kernels("four_bit").few_rows,
        (blocks(n, block_n), blocks(len(rows), block_m)),
        x.device,
        *(rows, *operands, bias, y, len(rows), n, columns),
        **dict(BM=block_m, BN=block_n, BK=128, BIAS=bias is not None, STAGES=stages, warps=warps),
        **constants,
    )
    return y


def _few_bf16_rows(rows, operands, bias, y, n: int, kind: str, scales: str) -> None:
    group, columns, device = KINDS[kind].group, rows.shape[1], rows.device
    block_m, block_n, warps, stages = tile_of_groups(len(rows), n, _triton.processors(device))
    depth = warps * group
    constants: dict[str, Any] = {"BM": block_m, "BN": block_n, "BK": depth, "GROUP": group, "KIND": kind}
    constants |= {"SCALES": scales, "BIAS": bias is not None, "WHOLE": columns % depth == 0, "STAGES": stages}
    launch(
        kernels("four_bit").few_bf16_rows,
        (blocks(n, block_n), blocks(len(rows), block_m)),
        device,
        *(rows, *operands[:-1], _triton.words_of(KINDS[kind].values, device), bias, y, len(rows), n, columns),
        warps=warps,
        **constants,
    )


linear = define(
    "triton_four_bit_linear(Tensor x, Tensor codes, Tensor[] scales, Tensor? bias, str kind) -> Tensor",
    None,
    lambda x, codes, scales, bias, kind: x.new_empty((*x.shape[:-1], codes.shape[0])),
    _linear,
)


def _dequantize(codes: torch.Tensor, scales: list[torch.Tensor], dtype: torch.dtype, kind: str) -> torch.Tensor:
    operands, constants, columns = _operands(kind, codes, scales)
    n = codes.shape[0]
    out = codes.new_empty((n, columns), dtype=dtype)
    grid = (blocks(columns, 128), blocks(n, 16))
    launch(kernels("four_bit").decode, grid, codes.device, *operands, out, n, columns, BN=16, BK=128, **constants)
    return out


# The weight [N, K] in a dtype, rounded once from the fp32 product.
dequantize = define(
    "triton_four_bit_dequantize(Tensor codes, Tensor[] scales, ScalarType dtype, str kind) -> Tensor",
    None,
    lambda codes, scales, dtype, kind: codes.new_empty(
        (codes.shape[0], 2 * codes.shape[1] * codes.itemsize), dtype=dtype
    ),
    _dequantize,
)
