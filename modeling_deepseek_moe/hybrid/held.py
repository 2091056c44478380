"""The experts that are used most, held in an accelerator's memory and computed there. Legend: L layers, E experts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeling_deepseek_moe.hybrid.slots import ExpertSlots, Key

REVIEW = 64  # passes through the first layer between two looks at the counts
MOST_SWAPS = 8  # experts that make room for others at one look
WORTH_IT = 1.25  # times as often used as what makes room for it
DECAY = 0.9  # of the counts at each look


class UseCounts:
    """How often each expert of each layer was used, lately."""

    def __init__(self, layers: Sequence[int], num_experts: int):
        self.rows = {layer: row for row, layer in enumerate(layers)}
        self.counts_LE = np.zeros((len(layers), num_experts))

    def add(self, layer: int, topk_indices: torch.Tensor) -> None:
        """Args: topk_indices: on the CPU; an index that is no expert is served elsewhere."""
        found = np.bincount(topk_indices.flatten().numpy(), minlength=self.counts_LE.shape[1])
        self.counts_LE[self.rows[layer]] += found[: self.counts_LE.shape[1]]

    def most_used(self, count: int) -> list[Key]:
        """The ``count`` most used, the first of them first; those used equally by turns of the layers."""
        experts, layers = np.meshgrid(np.arange(self.counts_LE.shape[1]), np.arange(len(self.rows)))
        order = np.lexsort((layers.ravel(), experts.ravel(), -self.counts_LE.ravel()))[:count]
        names = list(self.rows)
        return [(names[layers.flat[place]], int(experts.flat[place])) for place in order]

    def of(self, key: Key) -> float:
        return float(self.counts_LE[self.rows[key[0]], key[1]])


class HeldExperts:
    """The experts in ``slots``: the most used when it is made, and from then on as uses change."""

    def __init__(self, slots: ExpertSlots, counts: UseCounts, experts: dict[int, nn.Module]):
        self.slots, self._counts, self._experts = slots, counts, experts
        self._passes = 0
        self._by_layer: dict[int, frozenset[int]] = {}
        for layer, expert in counts.most_used(slots.count):
            slots.bring(layer, experts[layer], expert)

    def of(self, layer: int) -> frozenset[int]:
        """Held experts of a layer."""
        if layer not in self._by_layer:
            self._by_layer[layer] = frozenset(expert for held, expert in self.slots.held() if held == layer)
        return self._by_layer[layer]

    def review(self, layer: int) -> None:
        """Called in each pass through each layer; now and then what is used more takes the place of what is used less."""
        if layer != next(iter(self._counts.rows)):
            return
        self._passes += 1
        if self._passes % REVIEW:
            return
        held = self.slots.held()
        better = [key for key in self._counts.most_used(self.slots.count) if key not in held][:MOST_SWAPS]
        worst = sorted(held, key=self._counts.of)
        for new, old in zip(better, worst, strict=False):
            if self._counts.of(new) <= WORTH_IT * self._counts.of(old) + 1:
                break
            self._by_layer.clear()
            self.slots.drop(old)
            self.slots.bring(new[0], self._experts[new[0]], new[1])
        self._counts.counts_LE *= DECAY
