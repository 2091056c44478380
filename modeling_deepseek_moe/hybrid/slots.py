"""Experts in an accelerator's memory: slots of one expert each, the last used of all layers; computing with them there.

Legend: T tokens, E experts, K experts per token, D hidden size, R rows routed to one expert.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_moe.hybrid.copies import Copies, Event
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops.experts import run_experts
from modeling_deepseek_moe.quantized.experts import QuantizedMatrix, StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts

Key = tuple[int, int]  # layer, expert


@dataclass
class SlotStats:
    """What slots did since they were made. A copied expert is a miss; ``held_bytes`` are those of experts in them."""

    budget_bytes: int = 0
    held_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_copied: int = 0

    @property
    def hit_rate(self) -> float | None:
        return self.hits / (self.hits + self.misses) if self.hits or self.misses else None


class ExpertSlots:
    """``count`` experts like those of ``module`` in memory of ``device``.

    Args:
        config: of the model.

    Raises:
        ValueError: experts of a kind that is not kept on a device.
    """

    def __init__(self, config, module: nn.Module, count: int, device: torch.device):
        self.device, self.count, self.num_experts = device, count, module.num_experts
        self.expert_bytes, self.expert_values = (
            expert_bytes(module),
            3 * config.moe_intermediate_size * config.hidden_size,
        )
        self._pool = _pool(config, module, count, device)
        self._copies = Copies(device, self.expert_bytes)
        self._slots: OrderedDict[Key, int] = OrderedDict()  # the last used last
        self._free = list(range(count))[::-1]
        self._arriving: dict[Key, Event | None] = {}
        self._used: list[Event | None] = [self._copies.mark()] * count  # when what read a slot is over
        self._stats = SlotStats(budget_bytes=count * self.expert_bytes)

    def stats(self, reset: bool = False) -> SlotStats:
        found = replace(self._stats, held_bytes=len(self._slots) * self.expert_bytes)
        if reset:
            self._stats = SlotStats(budget_bytes=self._stats.budget_bytes)
        return found

    def holds(self, key: Key) -> bool:
        return key in self._slots

    def held(self) -> set[Key]:
        return set(self._slots)

    def drop(self, key: Key) -> None:
        self._free.append(self._slots.pop(key))
        self._arriving.pop(key, None)
        self._stats.evictions += 1

    def bring(self, layer: int, module: nn.Module, expert: int, keep: Sequence[int] = ()) -> int:
        """The slot of an expert, copied into it unless it is there; what was used longest ago makes room.

        Args:
            keep: experts of the layer that stay.

        Raises:
            Whatever reading or copying raises: the expert is not held then, and the slot is free.
        """
        key = layer, expert
        if key in self._slots:
            self._stats.hits += 1
            self._slots.move_to_end(key)
            return self._slots[key]
        if not self._free:
            kept = {(layer, index) for index in keep}
            self.drop(next(held for held in self._slots if held not in kept))
        slot = self._free[-1]
        targets = _parts(self._pool, slot)
        # scales in memory may be of another type than in the files
        sources = [part.to(target.dtype) for part, target in zip(_parts(module, expert), targets, strict=True)]
        self._arriving[key] = self._copies.put(sources, targets, self._used[slot])
        self._slots[key] = self._free.pop()
        self._stats.misses += 1
        self._stats.bytes_copied += self.expert_bytes
        return slot

    def run(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """The weighted sum ``[T, D]`` of the ``wanted`` experts, ascending; others that a token chose are left out."""
        if isinstance(module, MappedExperts):
            module.check_files()
        if self.device.type == "cuda":
            return self._run_together(layer, module, hidden_TD, topk_indices, topk_weights, wanted)
        return self._run_one_by_one(layer, module, hidden_TD, topk_indices, topk_weights, wanted)

    def _run_one_by_one(self, layer, module, hidden_TD, topk_indices, topk_weights, wanted) -> torch.Tensor:
        """With the bits of the reference: each expert on its rows, in ascending order, whatever slot it is in."""
        given = self._renumbered(topk_indices, {index: index for index in wanted}, self.num_experts)

        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            slot = self.bring(layer, module, index)
            self._copies.let_wait([self._arriving.pop((layer, index), None)])
            parts = _parts(self._pool, slot)
            if isinstance(self._pool, DeepseekExperts):
                gate_RI, up_RI = F.linear(x_RD, parts[0]).chunk(2, dim=-1)
                return F.linear(self._pool.act_fn(gate_RI) * up_RI, parts[1])
            matrices = [QuantizedMatrix(*parts[place : place + 2]) for place in range(0, len(parts), 2)]
            return self._pool.expert(matrices, x_RD)

        return run_experts(hidden_TD, given, topk_weights, expert, self.num_experts)

    def _run_together(self, layer, module, hidden_TD, topk_indices, topk_weights, wanted) -> torch.Tensor:
        """As many at once as there are slots, by what computes stacked experts; while they are, the next are copied."""
        step = self.count if len(wanted) <= self.count else max(1, self.count // 2)
        sums_TD: torch.Tensor | None = None
        groups = [wanted[start : start + step] for start in range(0, len(wanted), step)]
        for group in groups:
            slots = {expert: self.bring(layer, module, expert, group) for expert in group}
            self._copies.let_wait([self._arriving.pop((layer, expert), None) for expert in group])
            places = self._renumbered(topk_indices, slots, self.count)
            weights = topk_weights.masked_fill(places == self.count, 0.0)
            part_TD = self._pool(hidden_TD, places, weights)
            over = self._copies.mark()
            for slot in slots.values():
                self._used[slot] = over
            if len(groups) == 1:
                return part_TD
            sums_TD = part_TD.float() if sums_TD is None else sums_TD + part_TD
        return torch.zeros_like(hidden_TD) if sums_TD is None else sums_TD.to(hidden_TD.dtype)

    def _renumbered(self, topk_indices: torch.Tensor, numbers: dict[int, int], absent: int) -> torch.Tensor:
        table = torch.full((self.num_experts + 1,), absent, dtype=topk_indices.dtype)
        table[list(numbers)] = torch.tensor(list(numbers.values()), dtype=topk_indices.dtype)
        return table.to(topk_indices.device)[topk_indices]


def expert_bytes(module: nn.Module) -> int:
    """Of one expert as it lies in memory, its scales too.

    Raises:
        ValueError: experts of a kind that is not kept on a device.
    """
    return sum(part.nbytes for part in _parts(module, 0))


def _parts(module: nn.Module, index: int) -> list[torch.Tensor]:
    """One expert's tensors, in an order that all ways of storing it share."""
    if isinstance(module, DeepseekExperts):
        return [module.gate_up_proj.detach()[index], module.down_proj.detach()[index]]
    if isinstance(module, StackedQuantizedExperts) or type(module) is MappedExperts:
        return [part for matrix in module.matrices(index).values() for part in matrix]
    raise ValueError(
        f"expert memory on an accelerator: found {type(module).__name__}, wanted plain or released experts"
    )


def _pool(config, module: nn.Module, count: int, device: torch.device) -> nn.Module:
    """Stacked experts without values."""
    names = "moe_intermediate_size", "hidden_size", "hidden_act", "_experts_implementation"
    sizes = SimpleNamespace(n_routed_experts=count, **{name: getattr(config, name, None) for name in names})
    with torch.device(device):
        if isinstance(module, DeepseekExperts):
            pool = DeepseekExperts(sizes).to(module.down_proj.dtype)
        else:
            pool = StackedQuantizedExperts(sizes, module.weight_format)
    return pool.requires_grad_(False)
