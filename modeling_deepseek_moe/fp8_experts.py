"""Routed experts that stay FP8 as released: what their homes share, and the home on a device, where they are stacked.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, R rows routed to one expert.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.ops.experts import STACKS, routed_fp8


@dataclass(frozen=True)
class Fp8Matrix:
    """E4M3 codes ``[N, K]`` and their fp32 ``scale_inv``."""

    weight: torch.Tensor
    scale_inv: torch.Tensor

    def linear(self, x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        return block_fp8.linear(x, self.weight, self.scale_inv, None, block)


class Fp8Experts(KeepsDtype):
    """What the FP8 homes share: three matrices an expert, and the layer's result from them."""

    def __init__(self, config, block: tuple[int, int]):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.block = tuple(block)
        self.act_fn = ACT2FN[config.hidden_act]

    def matrices(self, index: int) -> dict[str, Fp8Matrix]:
        """``gate_proj [I, D]``, ``up_proj [I, D]`` and ``down_proj [D, I]`` of one expert."""
        raise NotImplementedError

    def forward(self, hidden_TD, topk_indices, topk_weights):
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "torch.export: FP8 experts run one by one, those that tokens chose, which no exported program can; "
                'load the model with quantization_config=FineGrainedFP8Config(dequantize=True), dtype="bfloat16"'
            )
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        return self.routed(hidden_TD, topk_indices, topk_weights)

    def routed(self, hidden_TD, topk_indices, topk_weights) -> torch.Tensor:
        """The layer's result, of hidden states in the dtype to compute in."""
        return routed_fp8(self, hidden_TD, topk_indices, topk_weights)

    def expert(self, matrices: Iterable[Fp8Matrix], x_RD: torch.Tensor) -> torch.Tensor:
        """One expert, of gate, up and down, by the reference."""
        gate, up, down = matrices
        return down.linear(self.act_fn(gate.linear(x_RD, self.block)) * up.linear(x_RD, self.block), self.block)


class StackedFp8Experts(Fp8Experts):
    """FP8 experts stacked on one device; gate and up keep scales of their own, so any width has its ragged edge."""

    dtype_kept: ClassVar[tuple[str, ...]] = STACKS

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
