"""Products of rows sorted by expert on a CUDA card, in bf16 and of FP8 codes, which read nothing on the host.

Legend: T tokens, E experts, K experts per token, S = T·K slots, R rows, N outputs and K inputs of a product.
"""

from functools import partial
from typing import NamedTuple

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._dispatch import DEEP_GEMM, takes
from modeling_deepseek_moe.ops._triton_table import Tiles, tiles
from modeling_deepseek_moe.ops.experts import deep_gemm

FP8 = torch.float8_e4m3fn
MOST_SLOTS = 1 << 17  # what is faster for that number is for more


class Order(NamedTuple):
    """Slots in the experts' order ``[S]``, and the end of each expert's ``[E]``; what is left over is served elsewhere."""

    slots: torch.Tensor
    ends: torch.Tensor
    top_k: int

    @classmethod
    def of(cls, topk_indices: torch.Tensor, experts: int) -> "Order":
        indices, device = topk_indices.contiguous(), topk_indices.device
        slots, ends = (torch.empty(n, dtype=torch.int32, device=device) for n in (indices.numel(), experts))
        kernel = _triton.kernels("experts").plan
        _triton.launch(kernel, (experts,), device, indices, slots, ends, len(slots), BLOCK=1024)
        return cls(slots, ends, topk_indices.shape[1])


def capability_of(device: torch.device) -> int:
    """Of a card; on a CPU, where the interpreter runs, that of the oldest."""
    return _triton.capability(device) if device.type == "cuda" else _triton.OLDEST


def _tiles(kernel: str, device: torch.device, columns: int, depth: int) -> Tiles:
    """No wider than the results or, of a low rank, deeper than the sum."""
    row = tiles(kernel, capability_of(device))
    columns, depth = min(row.columns, _triton.padded(columns)), min(row.depth, _triton.padded(depth))
    return row._replace(columns=columns, depth=depth)


def grouped_product(
    a: torch.Tensor,
    b: torch.Tensor,
    order: Order,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    *,
    turned: bool = False,
    by_token: bool = False,
    by_slot: bool = False,
    half: int | None = None,
    weights: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``a [S, K] · B_eᵀ → [S, N]`` of rows in the experts' order, each with its expert's ``b [E, N, K]``.

    Args:
        a_scale, b_scale: of factors in E4M3: ``[S, ⌈K/128⌉]`` and ``[E, ⌈N/128⌉, ⌈K/128⌉]``, fp32.
        turned: ``b`` is ``[E, K, N]``; not in FP8.
        by_token: ``a`` is ``[T, K]``, a row for each token.
        by_slot: the result in the slots' order.
        half: rows of ``b`` from here on have blocks of scales of their own.
        weights: of the slots, in their order, that the result is multiplied by.
        onto: ``[S, N]`` that the result is added to, in place.
        dtype: of the result. Rows that are served elsewhere are not written.
    """
    count, n, k = (b.shape[0], b.shape[2], b.shape[1]) if turned else b.shape
    fp8, device = a.dtype == FP8, a.device
    if a.shape[1] != k or b.dtype != a.dtype or (fp8 and (turned or a_scale is None or b_scale is None)):
        wanted = f"a [S, {k}] like it" + (" with scales of both, not turned" if fp8 else "")
        raise ValueError(
            f"experts: found factors {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}, wanted {wanted}"
        )
    tiling = tiles("grouped_fp8", capability_of(device)) if fp8 else _tiles("grouped", device, n, k)
    out = torch.empty((len(order.slots), n), dtype=dtype, device=device) if onto is None else onto
    grid = programs(len(order.slots), count, tiling.rows), _triton.blocks(n, tiling.columns)
    scales = (a_scale.contiguous(), b_scale.contiguous()) if fp8 else (a, b)
    if fp8 and capability_of(device) < _triton.FP8_CORES:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    _triton.launch(
        _triton.kernels("experts", "triton_grouped").product, grid, device,
        a.contiguous(), scales[0], b.contiguous(), scales[1], order.slots, order.ends,
        order.slots if weights is None else weights.contiguous(), out, count, n, k, n if half is None else half,
        TOP_K=order.top_k, WEIGHTED=weights is not None, BY_TOKEN=by_token, BY_SLOT=by_slot, TURNED=turned, FP8=fp8, ADD=onto is not None,
        EXPERTS=_triton.power_of_two(count), **tiling.constants(), warps=tiling.warps,
    )  # fmt: skip
    return out


def programs(slots: int, experts: int, rows: int) -> int:
    """No fewer than there are tiles, whatever the routing is."""
    return min(_triton.blocks(slots, rows) + experts, slots)


def grouped_outer(
    a: torch.Tensor, b: torch.Tensor, order: Order, *, a_by_token=False, b_by_token=False, dtype=torch.bfloat16
) -> torch.Tensor:
    """``Σ_r a[r]ᵀ · b[r]`` over each expert's rows: ``[S, N]``, ``[S, K]`` → ``[E, N, K]``; factors ``by_token`` are ``[T, …]``."""
    n, k, device, count = a.shape[1], b.shape[1], a.device, len(order.ends)
    tiling = _tiles("grouped_outer", device, n, k)
    out = torch.empty((count, n, k), dtype=dtype, device=device)
    grid = count, _triton.blocks(n, tiling.columns) * _triton.blocks(k, tiling.depth)
    _triton.launch(
        _triton.kernels("experts", "triton_grouped").outer, grid, device,
        a.contiguous(), b.contiguous(), order.slots, order.ends, out, n, k, TOP_K=order.top_k,
        A_BY_TOKEN=a_by_token, B_BY_TOKEN=b_by_token, **tiling.constants(), warps=tiling.warps,
    )  # fmt: skip
    return out


def combine(y_SD: torch.Tensor, indices: torch.Tensor, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """``[S, D] → [T, D]``: the sum over each token's slots that were served here, in fp32."""
    tokens, size = len(indices), y_SD.shape[1]
    out = torch.empty((tokens, size), dtype=dtype, device=y_SD.device)
    kernel, grid = _triton.kernels("experts").combine, (tokens, _triton.blocks(size, 256))
    _triton.launch(kernel, grid, y_SD.device, y_SD, indices, out, experts, size, TOP_K=indices.shape[1], BN=256)
    return out


def quantize(x: torch.Tensor, of_swiglu: Order | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``[R, K]`` → E4M3 codes and fp32 scales ``[R, ⌈K/128⌉]``, as `block_fp8.quantize_tiles`.

    Args:
        of_swiglu: rows in the experts' order, of which ``silu(x[:, :K]) · x[:, K:]`` is quantised.
    """
    columns = x.shape[1] // (1 if of_swiglu is None else 2)
    codes = torch.empty((len(x), columns), dtype=FP8, device=x.device)
    scale = torch.empty((len(x), _triton.blocks(columns, 128)), dtype=torch.float32, device=x.device)
    block = 128 * min(8, _triton.power_of_two(scale.shape[1]))
    ends, experts = (scale, 0) if of_swiglu is None else (of_swiglu.ends, len(of_swiglu.ends))
    kernel, grid = _triton.kernels("experts", "triton_grouped").quantize, (len(x), _triton.blocks(columns, block))
    arguments = x.contiguous(), ends, codes, scale, experts, columns
    _triton.launch(kernel, grid, x.device, *arguments, SWIGLU=of_swiglu is not None, BN=block)
    return codes, scale


def by_codes(hidden_TD, indices, weights, gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    """Each slot's ``weight · down(silu(gate x) · up x)``, ``[S, D]`` in fp32, of FP8 codes times FP8 codes.

    Activations are quantised in tiles of 1 × 128, as the releases' recipe has it. What is served elsewhere is not written.
    """
    tensors = hidden_TD, indices, weights, gate_up, down, gate_up_scale, down_scale
    own, theirs = partial(_by_codes, *tensors), partial(_by_deep_gemm, *tensors)
    device = hidden_TD.device

    def find_reason() -> str | None:
        reason = deep_gemm.unsupported(_triton.capability(device), gate_up, down)
        shape = *down.shape, _triton.power_of_two(min(indices.numel(), MOST_SLOTS))
        return reason or deep_gemm.unsuitable(hidden_TD, shape, theirs, own)

    return theirs() if takes(DEEP_GEMM, "FP8 experts", find_reason) else own()


def _by_codes(hidden_TD, indices, weights, gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    order = Order.of(indices, len(down))
    codes, scale = quantize(hidden_TD)
    inner = grouped_product(codes, gate_up, order, scale, gate_up_scale, by_token=True, half=down.shape[2])
    codes, scale = quantize(inner, order)
    return grouped_product(codes, down, order, scale, down_scale, by_slot=True, weights=weights, dtype=torch.float32)


def _by_deep_gemm(hidden_TD, indices, weights, gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    """The same; results of slots are rounded to bf16 before they are weighted."""
    order, slots = Order.of(indices, len(down)), indices.numel()
    segments = deep_gemm.segments(order.slots, order.ends)
    token = torch.where(segments.slots < slots, segments.slots, 0) // order.top_k
    codes, scale = (
        part.view(torch.uint8)[token] if part.dtype == FP8 else part[token] for part in quantize(hidden_TD)
    )
    inner = deep_gemm.product(codes.view(FP8), scale, gate_up, gate_up_scale, segments.owners)
    all_rows = order._replace(ends=order.ends.new_full((1,), len(inner)))
    y = deep_gemm.product(*quantize(inner, all_rows), down, down_scale, segments.owners)
    return y[segments.rows].float() * weights.reshape(slots, 1)
