"""The routed experts in their homes: stacked and trainable, stacked FP8, or mapped straight from the files.

All take ``hidden [T, D]``, ``topk_indices [T, K]``, ``topk_weights [T, K]`` and return ``[T, D]``.
Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, R rows routed to one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.ops import block_fp8

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def run_experts(
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    num_experts: int,
) -> torch.Tensor:
    """Σ_k weight_k · expert_k(hidden): each expert that was hit runs once, on the rows routed to it.

    An index of ``num_experts`` marks a slot that another expert-parallel rank serves, and is skipped.
    """
    top_k = topk_indices.shape[1]
    order = topk_indices.flatten().argsort(stable=True)
    counts = torch.bincount(topk_indices.flatten(), minlength=num_experts + 1)[:num_experts].tolist()
    out_TD = torch.zeros_like(hidden_TD)
    start = 0
    for index, count in enumerate(counts):
        if count:
            slots_R = order[start : start + count]
            tokens_R = slots_R // top_k
            result_RD = expert(index, hidden_TD[tokens_R]) * topk_weights.flatten()[slots_R, None]
            out_TD.index_add_(0, tokens_R, result_RD.to(out_TD.dtype))
            start += count
    return out_TD


@use_experts_implementation
class _StackedExperts(nn.Module):
    """Stacked weights under the names that transformers' grouped kernels and parallel plans expect."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD, topk_indices, topk_weights):
        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            gate_RI, up_RI = F.linear(x_RD, self.gate_up_proj[index]).chunk(2, dim=-1)
            return F.linear(self.act_fn(gate_RI) * up_RI, self.down_proj[index])

        return run_experts(hidden_TD, topk_indices, topk_weights, expert, self.num_experts)


class DeepseekExperts(_StackedExperts):
    """Trainable experts: ``gate_up_proj [E, 2I, D]``, ``down_proj [E, D, I]``; honours ``experts_implementation``."""

    def forward(self, hidden_TD, topk_indices, topk_weights):
        device_type = hidden_TD.device.type
        if torch.is_autocast_enabled(device_type):
            # The grouped kernels are no autocast ops: with fp32 weights they would run in fp32 throughout.
            dtype = torch.get_autocast_dtype(device_type)
            if self.gate_up_proj.dtype != dtype:
                cast = {name: weight.to(dtype) for name, weight in self.named_parameters(recurse=False)}
                return functional_call(self, cast, (hidden_TD.to(dtype), topk_indices, topk_weights))
        return super().forward(hidden_TD, topk_indices, topk_weights)


@dataclass(frozen=True)
class Fp8Matrix:
    """E4M3 codes ``[N, K]`` and their fp32 ``scale_inv``."""

    weight: torch.Tensor
    scale_inv: torch.Tensor

    def linear(self, x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        return block_fp8.linear(x, self.weight, self.scale_inv, None, block)


class _Fp8Experts(KeepsDtype):
    """What the FP8 homes share: the forward pass over `matrices`, one expert and one tile at a time."""

    def __init__(self, config, block: tuple[int, int]):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.block = tuple(block)
        self.act_fn = ACT2FN[config.hidden_act]

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        """``gate_proj [I, D]``, ``up_proj [I, D]`` and ``down_proj [D, I]`` of one expert."""
        raise NotImplementedError

    def forward(self, hidden_TD, topk_indices, topk_weights):
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))

        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            gate, up, down = self.matrices(index).values()
            return down.linear(self.act_fn(gate.linear(x_RD, self.block)) * up.linear(x_RD, self.block), self.block)

        return run_experts(hidden_TD, topk_indices, topk_weights, expert, self.num_experts)


class StackedFp8Experts(_Fp8Experts):
    """FP8 experts stacked on one device; gate and up keep scales of their own, so any width has its ragged edge."""

    dtype_kept: ClassVar[tuple[str, ...]] = (
        "gate_up_proj",
        "gate_up_proj_scale_inv",
        "down_proj",
        "down_proj_scale_inv",
    )

    def __init__(self, config, block: tuple[int, int]):
        super().__init__(config, block)
        e, i, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        rows_ID, cols_ID = block_fp8.scale_shape((i, d), self.block)
        rows_DI, cols_DI = block_fp8.scale_shape((d, i), self.block)
        self.intermediate_dim, self.scale_rows = i, rows_ID
        for name, shape, dtype in (
            ("gate_up_proj", (e, 2 * i, d), block_fp8.FP8_DTYPE),
            ("gate_up_proj_scale_inv", (e, 2 * rows_ID, cols_ID), torch.float32),
            ("down_proj", (e, d, i), block_fp8.FP8_DTYPE),
            ("down_proj_scale_inv", (e, rows_DI, cols_DI), torch.float32),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        gate, up = self.gate_up_proj[index].split(self.intermediate_dim)
        gate_scale, up_scale = self.gate_up_proj_scale_inv[index].split(self.scale_rows)
        return {
            "gate_proj": Fp8Matrix(gate, gate_scale),
            "up_proj": Fp8Matrix(up, up_scale),
            "down_proj": Fp8Matrix(self.down_proj[index], self.down_proj_scale_inv[index]),
        }


class MappedExperts(_Fp8Experts):
    """FP8 experts that stay in the checkpoint's memory-mapped files: no copy, no load time, no private memory.

    The matrices are views, not parameters: they have no place in ``state_dict`` and never leave the CPU.
    Saving writes them from the mapped bytes.
    """

    def __init__(self, config, block: tuple[int, int], experts: Sequence[dict[str, Fp8Matrix]]):
        super().__init__(config, block)
        self._experts = tuple(experts)

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        return self._experts[index]

    def named_matrices(self) -> Iterator[tuple[str, Fp8Matrix]]:
        """``("{expert}.{projection}", matrix)`` for every expert, as the release orders them."""
        for index, expert in enumerate(self._experts):
            for name, matrix in expert.items():
                yield f"{index}.{name}", matrix

    @property
    def num_mapped(self) -> int:
        """Parameters (codes, without scales) that are mapped."""
        return sum(matrix.weight.numel() for _, matrix in self.named_matrices())

    def extra_repr(self):
        return f"{self.num_experts} experts mapped, block={self.block}"
