"""peft's layers for what it has none for: stacks of experts in any format, and linear layers whose weight is codes.

peft makes them itself: `targets` registers them in an adapter's config (`LoraConfig._register_custom_module`). Their tensors
have the names and shapes of peft's own. Importing this file imports peft.

Legend: T tokens, E experts, D hidden size, I expert width, r rank.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from modeling_deepseek_moe.adapters.codes import OnCodes
from modeling_deepseek_moe.adapters.merging import Merge, add_to_codes, copy_of, write_over
from modeling_deepseek_moe.adapters.refusals import is_overwritten
from modeling_deepseek_moe.formats.row import Scales
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops.experts import IMPLEMENTATION, STACKS, Copies, LowRank, Pair
from modeling_deepseek_moe.quantized.experts import QuantizedExperts, QuantizedMatrix
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts

BASE = "__base__"  # peft's name for no adapter


class ParamWrapper(lora.ParamWrapper):
    """LoRA on one stack of routed experts: low-rank products next to the base's own, no dense difference.

    Wrappers are nested, gate's and up's inside that of down, and the outermost one computes for all. peft knows such layers
    by the name of their class, so this one has its name too.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs):
        if parameter_name not in STACKS:
            found = "a module" if parameter_name is None else parameter_name
            raise ValueError(
                f"{kwargs.get('target_name')}: found {found} for an adapter's target, wanted {' or '.join(STACKS)} of routed "
                'experts, in target_parameters, as "mlp.experts.down_proj"'
            )
        self.merge_record = Merge()
        self._stack = str(kwargs.get("target_name"))
        self._kept: dict[int, tuple] = {}
        self._copies: dict[str, Copies] = {}
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, **kwargs)

    def get_param(self) -> torch.Tensor:
        """The stack, or what peft has to know of one that is codes: shape, device, and fp32 for the adapter's dtype."""
        experts = self.get_base_layer()
        if not isinstance(experts, QuantizedExperts):
            return super().get_param()
        gate, *_ = experts.matrices(0).values()
        width, hidden = experts.weight_format.value_shape(gate.codes.shape)
        shape = (2 * width, hidden) if self.parameter_name == STACKS[0] else (hidden, width)
        device = torch.device("cpu") if gate.codes.is_meta else gate.codes.device
        return torch.zeros((), device=device).expand(experts.num_experts, *shape)

    def forward(self, hidden_TD: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        experts = self.get_base_layer()
        if not self._runs_low_rank(experts):
            if adapter_names is not None:
                kwargs["adapter_names"] = adapter_names
            return super().forward(hidden_TD, *args, **kwargs)
        low_rank = LowRank()
        for wrapper in self._nested():
            if wrapper.disable_adapters:
                if wrapper.merged:
                    wrapper.unmerge()
            elif wrapper.merged:
                if adapter_names is not None:
                    raise ValueError(
                        "adapter_names: found adapters merged into the experts, wanted them apart: unmerge them"
                    )
            else:
                own = wrapper._pairs() if adapter_names is None else wrapper._pairs_of(adapter_names, hidden_TD)
                field = "gate_up" if wrapper.parameter_name == STACKS[0] else "down"
                low_rank = low_rank._replace(**{field: tuple(own)})
        if not any(low_rank):
            return experts(hidden_TD, *args, **kwargs)
        return experts(hidden_TD, *args, low_rank=low_rank, **kwargs)

    def for_engine(self) -> tuple | None:
        """The experts, and A, turned B and scale of both stacks, as `ops.experts.cpu.run_low_rank` takes them and as long as
        nothing changes the same tensors; ``None`` where the engine cannot run the adapters.
        """
        experts, found = self.get_base_layer(), dict.fromkeys(STACKS)
        if not self._runs_low_rank(experts):
            return None
        for wrapper in self._nested():
            pairs = [] if wrapper.disable_adapters or wrapper.merged else list(wrapper._pairs())
            if len(pairs) > 1 or (wrapper.disable_adapters and wrapper.merged):
                return None
            found[wrapper.parameter_name] = pairs[0].packed() if pairs else None
        return experts, *found.values()

    def check_merge(self, names: list[str]) -> None:
        """
        Raises:
            ValueError: adapters of these names cannot be merged into the experts as they lie now.
        """
        experts = self.get_base_layer()
        if isinstance(experts, MappedExperts):
            raise ValueError(
                f"{self._stack}: found experts in the checkpoint's mapped files, wanted them in memory to merge adapter "
                f"{', '.join(names)} into: `deepseek-moe convert merge-adapter` merges into the files themselves; or, before there is "
                f"an adapter, {experts.weight_format.to_floats}"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self._merge(adapter_names, safe_merge, keep=True)

    def unmerge(self) -> None:
        if isinstance(self.get_base_layer(), QuantizedExperts):
            for expert, matrices in self._kept.items():
                self._write(expert, matrices)
            self._kept.clear()
            self.merged_adapters.clear()
        else:
            while self.merged_adapters:
                self._add_to_stack(self.merged_adapters.pop(), -1, safe=False)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        if merge:
            for wrapper in self._nested():
                wrapper._merge(adapter_names, safe_merge, keep=False)
        return self.get_base_layer()

    def delete_adapter(self, adapter_name: str) -> None:
        self._copies.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True):
        self._copies.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._copies.clear()
        return super()._apply(fn, recurse)

    def _nested(self) -> Iterator["ParamWrapper"]:
        wrapper: nn.Module = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def _runs_low_rank(self, experts: nn.Module) -> bool:
        """Not where another implementation of experts was asked for, or stacks are no plain tensors: peft has a way for those."""
        if not isinstance(experts, DeepseekExperts):
            return True
        stacks = [experts._parameters.get(name) for name in STACKS]
        asked = experts.config._experts_implementation
        return asked in (None, IMPLEMENTATION, "eager") and all(
            type(stack) in (torch.Tensor, nn.Parameter) for stack in stacks
        )

    def _pairs(self) -> Iterator[Pair]:
        """Of the active adapters."""
        for name in self.active_adapters:
            if name in self.lora_A:
                yield Pair(*self._matrices(name), self.scaling[name], self._copies_of(name))

    def _pairs_of(self, adapter_names: list[str], hidden_TD: torch.Tensor) -> Iterator[Pair]:
        """Of the adapters that the sequences of a batch have each for itself."""
        tokens, sequences = len(hidden_TD), len(adapter_names)
        if tokens % sequences:
            raise ValueError(
                f"adapter_names: found {sequences} names for {tokens} tokens, wanted one for each sequence"
            )
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.lora_A:
                own = torch.tensor([float(name == other) for other in adapter_names], device=hidden_TD.device)
                scale_T = (own * self.scaling[name]).repeat_interleave(tokens // sequences)
                yield Pair(*self._matrices(name), scale_T, self._copies_of(name))

    def _matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[E, r, in]`` as it lies, and a view of B, ``[E, out, r]``, of which peft has the experts last."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.view(self.num_experts, -1, a.shape[-1])
        return a, b.view(len(b), -1, self.num_experts).permute(2, 0, 1)

    def _copies_of(self, name: str) -> Copies:
        return self._copies.setdefault(name, Copies())

    def _difference(self, name: str, expert: int) -> torch.Tensor:
        """s · B · A of one expert, in fp32 or wider."""
        a, b = self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()
        a, b = a.view(self.num_experts, -1, a.shape[-1])[expert], b.view(len(b), -1, self.num_experts)[..., expert]
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.to(wide) @ a.to(wide)) * self.scaling[name]

    def _merge(self, adapter_names: list[str] | None, safe: bool, keep: bool) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if names:
            self.check_merge(names)
        for name in names:
            if isinstance(self.get_base_layer(), QuantizedExperts):
                self._add_to_codes(name, safe, keep)
            else:
                self._add_to_stack(name, 1, safe)
            self.merged_adapters.append(name)

    def _add_to_stack(self, name: str, sign: int, safe: bool) -> None:
        stack = super().get_param().data
        sums = ((expert, stack[expert] + sign * self._difference(name, expert)) for expert in range(self.num_experts))
        if safe:
            sums = list(sums)
            if not all(torch.isfinite(total).all() for _, total in sums):
                raise ValueError(f"adapter {name}: found NaN or Inf once merged, wanted finite values")
        for expert, total in sums:
            stack[expert] = total

    def _add_to_codes(self, name: str, safe: bool, keep: bool) -> None:
        sums = ((expert, self._sum(name, expert)) for expert in range(self.num_experts))
        if safe:  # a sum that is not finite has no codes: an error before any are written
            sums = iter(list(sums))
        for expert, new in sums:
            if keep and expert not in self._kept:
                self._kept[expert] = tuple(copy_of(*matrix) for matrix in self._own(expert))
            self._write(expert, new)

    def _sum(self, name: str, expert: int) -> list[tuple[torch.Tensor, Scales]]:
        """Codes and scales of one expert's own matrices with an adapter's difference."""
        matrices, weight_format = self._own(expert), self.get_base_layer().weight_format
        parts = self._difference(name, expert).float().chunk(len(matrices))
        return [
            add_to_codes(weight_format, *matrix, part.contiguous(), self.merge_record)
            for matrix, part in zip(matrices, parts, strict=True)
        ]

    def _own(self, expert: int) -> list[QuantizedMatrix]:
        gate, up, down = self.get_base_layer().matrices(expert).values()
        return [gate, up] if self.parameter_name == STACKS[0] else [down]

    def _write(self, expert: int, matrices) -> None:
        for own, new in zip(self._own(expert), matrices, strict=True):
            write_over(*own, new)


class LoraLinear(OnCodes, lora.Linear):
    """LoRA and its variants on a linear layer whose weight is codes."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs):
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: lora.LoraConfig, **kwargs) -> None:
        if is_overwritten(config):
            config = copy.copy(config)
            config.init_lora_weights = True
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)


CUSTOM = {DeepseekExperts: ParamWrapper, QuantizedExperts: ParamWrapper, QuantizedLinear: LoraLinear}
