"""Products of rows sorted by expert with codes as they are stored, and with their transposes, on a CUDA card.

Codes become bf16 in registers, a tile at a time. Legend: S slots, E experts, N rows and K columns of a matrix, D hidden size,
I expert width.
"""

from typing import NamedTuple

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._triton_table import Tiles, tiles
from modeling_deepseek_moe.ops.experts.triton import FP8, MANY_ROWS, decoder, group_of, is_looked_up, plain, table_of
from modeling_deepseek_moe.ops.experts.triton_products import Order, capability_of, programs
from modeling_deepseek_moe.ops.four_bit.reference import NESTED_GROUP, NestedScales


class Matrix(NamedTuple):
    """A matrix ``[N, K]`` of every expert: int32 words of codes ``[E, N, ·]`` and scales ``[E, ·, ·]``, rows of an expert next to each other.

    ``name``: of the format, one of `KINDS` or ``"fp8"``. Nested scales are stacked in each of their parts.
    """

    words: torch.Tensor
    scales: torch.Tensor | NestedScales
    name: str

    @classmethod
    def of(cls, codes: torch.Tensor, scales: torch.Tensor | NestedScales, name: str) -> "Matrix":
        return cls(codes.view(torch.int32), scales, name)

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N, K."""
        experts, rows, words = self.words.shape
        return experts, rows, words * (4 if self.name == FP8 else 8)

    def _constants(self, tiling: Tiles) -> dict:
        return {
            "KIND": decoder(self.name),
            "GROUP": group_of(self.name),
            "EXPERTS": _triton.power_of_two(len(self.words)),
            **tiling.constants(),
            "warps": tiling.warps,
        }

    def _table(self) -> torch.Tensor:
        return table_of(self.name, self.words.device) if is_looked_up(self.name) else self.words

    def _plain_scales(self) -> torch.Tensor:
        """Nested ones expanded, exponents as bytes."""
        if isinstance(self.scales, NestedScales):
            codes, absmax, table, offset = self.scales
            values = table.index_select(0, codes.flatten().int()).view(codes.shape)
            each = absmax.repeat_interleave(NESTED_GROUP, dim=1)[:, : codes[0].numel()].reshape(codes.shape)
            return torch.addcmul(offset.view(-1, 1, 1), values, each)
        return plain(self.scales)

    def product(self, a: torch.Tensor, order: Order, out: torch.Tensor, *, by_token=False, by_slot=False) -> None:
        """``a [S, K] · W_eᵀ`` into ``out [S, N]``, whose rows may lie apart; else as `triton_products.grouped_product`."""
        (count, n, k), slots = self.shape, len(order.slots)
        if a.shape[1] != k or out.shape != (slots, n):
            raise ValueError(
                f"experts: found a product {list(a.shape)} → {list(out.shape)} with codes of {[count, n, k]}, wanted [·, {k}] → {[slots, n]}"
            )
        few = "" if slots >= MANY_ROWS * count else "_few"
        tiling, scales = tiles(f"grouped_codes{few}", capability_of(a.device)), self._plain_scales()
        _triton.launch(
            _triton.kernels("experts", "triton_codes_kernels").forward,
            (programs(slots, count, tiling.rows), _triton.blocks(n, tiling.columns)), a.device,
            a.contiguous(), self.words, scales, self._table(), *order[:2], out, count, n, k,
            self.words.stride(0), scales.stride(0), out.stride(0),
            TOP_K=order.top_k, BY_TOKEN=by_token, BY_SLOT=by_slot, **self._constants(tiling),
        )  # fmt: skip

    def product_back(
        self,
        a: torch.Tensor,
        order: Order,
        dtype: torch.dtype,
        *,
        by_token=False,
        by_slot=False,
        more: "Matrix | None" = None,
    ) -> torch.Tensor:
        """``a [S, N] · W_e → [S, K]``; with ``more``, a matrix like this one, ``a [S, 2N]`` times both, one above the other."""
        count, n, k = self.shape
        shapes = [list(matrix.shape) for matrix in (self, more) if matrix is not None]
        if a.shape[1] != n * len(shapes) or shapes[-1] != shapes[0]:
            found = f"{list(a.shape)} with transposed codes of {' and '.join(map(str, shapes))}"
            raise ValueError(
                f"experts: found a product of {found}, wanted [·, {n * len(shapes)}] and codes of one shape"
            )
        tiling = tiles("grouped_codes_back", capability_of(a.device))
        out = torch.empty((len(order.slots), k), dtype=dtype, device=a.device)
        scales = self._plain_scales()
        more_scales = scales if more is None else more._plain_scales()
        _triton.launch(
            _triton.kernels("experts", "triton_codes_kernels").backward,
            (programs(len(order.slots), count, tiling.rows), _triton.blocks(k, tiling.columns)), a.device,
            a.contiguous(), self.words, scales, (more or self).words, more_scales, self._table(), *order[:2], out, count, n, k,
            self.words.stride(0), scales.stride(0), a.shape[1],
            TOP_K=order.top_k, BY_TOKEN=by_token, BY_SLOT=by_slot, MORE=more is not None, **self._constants(tiling),
        )  # fmt: skip
        return out


class Codes(NamedTuple):
    """A layer's experts as codes, with the products of `triton_trained.Stacks`."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def experts(self) -> int:
        return len(self.down.words)

    def gate_up_product(self, x_TD: torch.Tensor, order: Order) -> torch.Tensor:
        width = self.gate.shape[1]
        out = torch.empty((len(order.slots), 2 * width), dtype=torch.bfloat16, device=x_TD.device)
        self.gate.product(x_TD, order, out[:, :width], by_token=True)
        self.up.product(x_TD, order, out[:, width:], by_token=True)
        return out

    def down_product(self, h_SI: torch.Tensor, order: Order) -> torch.Tensor:
        out = torch.empty((len(order.slots), self.down.shape[1]), dtype=torch.float32, device=h_SI.device)
        self.down.product(h_SI, order, out, by_slot=True)
        return out

    def gate_up_back(self, d_inner_S2I: torch.Tensor, order: Order) -> torch.Tensor:
        return self.gate.product_back(d_inner_S2I, order, torch.float32, by_slot=True, more=self.up)

    def down_back(self, dy_TD: torch.Tensor, order: Order) -> torch.Tensor:
        return self.down.product_back(dy_TD, order, torch.bfloat16, by_token=True)
