"""Where each layer's experts are computed in each pass: on the CPU, on the accelerator, or some here and some there.

Legend: T tokens, K experts per token, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from modeling_deepseek_moe.device_memory import give_back
from modeling_deepseek_moe.hybrid import costs
from modeling_deepseek_moe.hybrid.crossing import Arrival, Crossing
from modeling_deepseek_moe.hybrid.held import HeldExperts, UseCounts
from modeling_deepseek_moe.hybrid.slots import ExpertSlots
from modeling_deepseek_moe.ops._memory import exhausted

logger = logging.get_logger(__name__)
FEW_TOKENS = 16  # that are never worth copying experts for, where the CPU computes them


class Pending(NamedTuple):
    """A layer's input on the device, and on its way to the CPU."""

    hidden_TD: torch.Tensor
    topk_indices: torch.Tensor
    topk_weights: torch.Tensor
    arrival: Arrival


class ExpertPlaces:
    """Of all layers of a model together. Copies and pickles of it are ``None``: a copy's experts are computed on the CPU.

    Attributes:
        held: experts in the device's memory for good, computed there; ``None`` without any.
        passing: slots that experts pass through, last used ones kept; ``None`` without any.
        computes_all: every expert is computed on the device, from ``passing``.
        rates: of this machine, by which a prompt's place is chosen; ``None``: the CPU computes it.
    """

    def __init__(self, device: torch.device, layers: dict[int, nn.Module] | None = None, top_k: int = 0):
        self.crossing = Crossing(device)
        self.layers = layers or {}
        self.top_k = top_k
        first = next(iter(self.layers.values()), None)
        self.counts = UseCounts(list(self.layers), first.num_experts) if first is not None else None
        self.held: HeldExperts | None = None
        self.passing: ExpertSlots | None = None
        self._for_prompts: ExpertSlots | None = None  # while other slots have their place
        self.computes_all = False
        self.rates: costs.Rates | None = None

    @torch.compiler.disable
    def begin(self, hidden_TD: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor) -> Pending:
        arrival = self.crossing.leave(hidden_TD, topk_indices, topk_weights)
        return Pending(hidden_TD, topk_indices, topk_weights, arrival)

    @torch.compiler.disable
    def finish(self, layer: int, experts: nn.Module, pending: Pending) -> torch.Tensor:
        """The routed experts' sum ``[T, D]``, on the device.

        Raises:
            torch.OutOfMemoryError: the device has too little memory; what was made for the sum is gone, and experts that were
                brought are held.
        """
        try:
            return self._finish(layer, experts, pending)
        except RuntimeError as error:
            failure = exhausted(error)  # not the error: its traceback holds what was made
            if failure is None:
                raise
        device, tokens = self.crossing.device, len(pending.hidden_TD)
        slots = self.passing, None if self.held is None else self.held.slots
        held = sum(own.count * own.expert_bytes for own in slots if own is not None)
        raise torch.OutOfMemoryError(
            f"{device}: memory is exhausted in the experts of layer {layer}, {tokens:,} tokens ({failure}); room for experts takes "
            f"{held:,} bytes, now {give_back(device)}: wanted fewer tokens at once, or a smaller gpu= in set_expert_memory"
        )

    def _finish(self, layer: int, experts: nn.Module, pending: Pending) -> torch.Tensor:
        given = pending.hidden_TD, pending.topk_indices, pending.topk_weights
        hidden_TD, indices, weights, _ = pending.arrival.wait()
        is_own = self.layers.get(layer) is experts  # else an adapter is around them
        if not is_own or self.counts is None:
            return self.crossing.come_back(experts(hidden_TD, indices, weights))
        self.counts.add(layer, indices)
        wanted = [index for index in indices.unique().tolist() if index < experts.num_experts]
        if self._passes_through(len(hidden_TD)):
            return self.passing.run(layer, experts, *given, wanted)
        if self.held is None:
            return self.crossing.come_back(experts(hidden_TD, indices, weights))
        self.held.review(layer)
        here = self.held.of(layer)
        there = [index for index in wanted if index in here]
        if not there:
            return self.crossing.come_back(experts(hidden_TD, indices, weights))
        computed = self.held.slots.run(layer, experts, *given, there)  # launched: the CPU goes on
        if len(there) == len(wanted):
            return computed
        rest = torch.isin(indices, torch.tensor(there))
        indices, weights = indices.masked_fill(rest, experts.num_experts), weights.masked_fill(rest, 0.0)
        returned = self.crossing.come_back(experts(hidden_TD, indices, weights))
        return (computed.float() + returned.float()).to(hidden_TD.dtype)

    def take(self, slots: ExpertSlots, compute: str, share: float) -> None:
        """Use ``slots``, which have room for ``share`` of all experts, for one of both ways to compute."""
        if compute not in (costs.CPU, costs.DEVICE):
            layer = self._cost_of_a_layer(slots)
            compute = costs.CPU if self.rates is None else costs.faster(layer, 1, self.rates, share)
        if compute == costs.DEVICE:
            self._for_prompts, self.passing, self.computes_all = self.passing, slots, True
        else:
            self.held = HeldExperts(slots, self.counts, self.layers)

    def release(self) -> None:
        """Give up what `take` took."""
        if self.computes_all:
            self._for_prompts, self.passing, self.computes_all = None, self._for_prompts, False
        self.held = None

    def _passes_through(self, tokens: int) -> bool:
        if self.passing is None or self.computes_all:
            return self.passing is not None
        if tokens <= FEW_TOKENS or self.rates is None:
            return False
        return costs.faster(self._cost_of_a_layer(self.passing), tokens, self.rates) == costs.DEVICE

    def _cost_of_a_layer(self, slots: ExpertSlots) -> costs.Layer:
        return costs.Layer(slots.num_experts, self.top_k, slots.expert_bytes, slots.expert_values)

    def __reduce__(self):
        return type(None), ()
