"""Which experts the next layer will want, told by its own router from the hidden state of this one.

The residual stream changes little from one layer to the next, so the next router, on this layer's normed input with
the next norm's weights in place of this one's, often chooses as it will choose later. How often is found out as it
goes, rank by rank, whether or not anything was read on its word.
"""

from collections.abc import Sequence

import torch

from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter

FEW_TOKENS = 8  # more tokens want most experts of a layer, and reading takes far longer than what lies between layers
RANKS = 4  # experts predicted at most: more would not be read in the time between two layers
MIN_PRECISION = 0.8  # of the guesses of a rank came true
LEAST_GUESSES = 8
DECAY = 0.95  # what a guess counts for at the next one


class NextLayerPredictor:
    """What `gate`, the router of layer ``layer`` after ``norm``, will choose, seen from after ``norm_here``."""

    def __init__(self, layer: int, gate: DeepseekTopkRouter, norm: DeepseekRMSNorm, norm_here: DeepseekRMSNorm):
        self.layer, self.gate = layer, gate
        self._norms = (norm, norm_here)
        self._ratio: torch.Tensor | None = None
        self._guesses: list[int] = []
        self._made, self._right = [0.0] * RANKS, [0.0] * RANKS

    @torch.no_grad()
    def rank(self, hidden_TD: torch.Tensor) -> list[int]:
        """Experts, the likeliest first; none where the router's weights are not at hand."""
        weights = (self.gate.weight, *(module.weight for module in self._norms))
        if any(weight.device != hidden_TD.device for weight in weights):  # offloaded
            return []
        if self._ratio is None:
            norm, norm_here = (module.weight.float() for module in self._norms)
            self._ratio = torch.where(norm_here == 0, 1.0, norm / norm_here)
        # past its hooks: they count or record what is really chosen
        _, weights, indices = self.gate.forward(hidden_TD.float() * self._ratio)
        total = torch.zeros(self.gate.num_experts).index_add_(0, indices.flatten(), weights.flatten())
        return total.topk(min(indices.numel(), self.gate.num_experts)).indices.tolist()

    def predict(self, missing: Sequence[int]) -> list[int]:
        """Those of ``missing``, the likeliest first, that will be wanted with confidence. `update` comes next."""
        self._guesses = list(missing[:RANKS])
        confident = []
        for rank, expert in enumerate(self._guesses):
            if self._made[rank] < LEAST_GUESSES * DECAY**LEAST_GUESSES or self.precision(rank) < MIN_PRECISION:
                break
            confident.append(expert)
        return confident

    def precision(self, rank: int) -> float:
        return self._right[rank] / self._made[rank] if self._made[rank] else 0.0

    def update(self, wanted: Sequence[int]) -> None:
        """Compare the last guess with what the layer wants."""
        for rank, expert in enumerate(self._guesses):
            self._made[rank] = self._made[rank] * DECAY + 1
            self._right[rank] = self._right[rank] * DECAY + (expert in wanted)
        self._guesses = []
