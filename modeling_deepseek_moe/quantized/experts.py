"""Routed experts that stay in a checkpoint's format: what both ways of storing them share, and the stacked one.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, R rows routed to one expert.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.layers import KeepsDtype
from modeling_deepseek_moe.ops.experts import STACKS, LowRank, routed_quantized


class QuantizedMatrix(NamedTuple):
    """The codes of a weight ``[N, K]`` and their scales, a tensor or `ops.four_bit.NestedScales`."""

    codes: torch.Tensor
    scales: Any

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, and scales or the parts of nested ones."""
        return self.codes, *((self.scales,) if isinstance(self.scales, torch.Tensor) else self.scales)


class QuantizedExperts(KeepsDtype):
    """What both ways of storing them share: three matrices per expert in one `WeightFormat`, and the layer's result from them."""

    shows_stacks: bool = False

    def __init__(self, config, weight_format: WeightFormat):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.weight_format = weight_format
        self.act_fn = ACT2FN[config.hidden_act]

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """As `nn.Module.named_parameters`; while ``shows_stacks`` is set, `STACKS` that are no parameters are named as well.

        So what looks for a parameter to adapt finds those of matrices that lie elsewhere; an empty tensor stands for each.
        """
        own = dict(super().named_parameters(prefix, recurse, remove_duplicate))
        if self.shows_stacks:
            for name in (
                STACKS
            ):  # in their order, in which adapters are nested, whatever matrices of such a name are parameters
                key = f"{prefix}.{name}" if prefix else name
                yield key, own.pop(key) if key in own else nn.Parameter(torch.empty(0), requires_grad=False)
        yield from own.items()

    def matrices(self, index: int) -> dict[str, QuantizedMatrix]:
        """``gate_proj [I, D]``, ``up_proj [I, D]`` and ``down_proj [D, I]`` of one expert."""
        raise NotImplementedError

    def dequantized(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]`` in ``dtype``, as a fresh tensor."""
        return self.weight_format.dequantize(*matrix, dtype)

    def forward(self, hidden_TD, topk_indices, topk_weights, low_rank: LowRank | None = None):
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                f"torch.export: {self.weight_format.name} experts run one by one, those that tokens chose, which no exported program "
                f"can; {self.weight_format.to_floats}"
            )
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        return self.routed(hidden_TD, topk_indices, topk_weights, low_rank)

    def routed(self, hidden_TD, topk_indices, topk_weights, low_rank: LowRank | None = None) -> torch.Tensor:
        """The layer's result, of hidden states in the dtype to compute in, with what an adapter adds to its matrices."""
        return routed_quantized(self, hidden_TD, topk_indices, topk_weights, low_rank)

    def expert(self, matrices: Iterable[QuantizedMatrix], x_RD: torch.Tensor) -> torch.Tensor:
        """One expert, of gate, up and down, by the reference."""
        (gate, up, down), multiply = matrices, self.weight_format.multiply
        return multiply(self.act_fn(multiply(x_RD, *gate)) * multiply(x_RD, *up), *down)


class StackedQuantizedExperts(QuantizedExperts):
    """Experts stacked on one device; gate and up keep scales of their own, so any width has its ragged edge."""

    def __init__(self, config, weight_format: WeightFormat):
        super().__init__(config, weight_format)
        e, i, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        codes_ID, codes_DI = weight_format.code_shape((i, d)), weight_format.code_shape((d, i))
        scales_ID, scales_DI = weight_format.scale_shape((i, d)), weight_format.scale_shape((d, i))
        self.intermediate_dim, self.scale_rows = i, scales_ID[0]
        self.dtype_kept: dict[str, torch.dtype] = {}
        for name, rows, codes, scales in (
            ("gate_up_proj", 2, codes_ID, scales_ID),
            ("down_proj", 1, codes_DI, scales_DI),
        ):
            for suffix, (n, k), dtype in (
                ("", codes, weight_format.code_dtype),
                (weight_format.scale_parameter, scales, weight_format.scale_dtype),
            ):
                stack = torch.empty((e, rows * n, k), dtype=dtype)
                self.register_parameter(f"{name}{suffix}", nn.Parameter(stack, requires_grad=False))
                self.dtype_kept[f"{name}{suffix}"] = dtype

    def matrices(self, index: int) -> dict[str, QuantizedMatrix]:
        return self.matrices_by(lambda stack: stack[index])

    def stacked(self) -> dict[str, QuantizedMatrix]:
        """As `matrices`, of all experts: ``[E, N, ·]``, views of the stacks."""
        own, suffix = self._parameters, self.weight_format.scale_parameter
        gate, up = own["gate_up_proj"].split(self.intermediate_dim, dim=1)
        gate_scale, up_scale = own[f"gate_up_proj{suffix}"].split(self.scale_rows, dim=1)
        return {
            "gate_proj": QuantizedMatrix(gate, gate_scale),
            "up_proj": QuantizedMatrix(up, up_scale),
            "down_proj": QuantizedMatrix(own["down_proj"], own[f"down_proj{suffix}"]),
        }

    def matrices_by(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, QuantizedMatrix]:
        """As `matrices`, of the expert that ``pick`` takes out of a stack ``[E, ...]``."""
        own, suffix = self._parameters, self.weight_format.scale_parameter
        gate, up = pick(own["gate_up_proj"]).split(self.intermediate_dim)
        gate_scale, up_scale = pick(own[f"gate_up_proj{suffix}"]).split(self.scale_rows)
        return {
            "gate_proj": QuantizedMatrix(gate, gate_scale),
            "up_proj": QuantizedMatrix(up, up_scale),
            "down_proj": QuantizedMatrix(pick(own["down_proj"]), pick(own[f"down_proj{suffix}"])),
        }
