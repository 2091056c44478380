"""Sampling whose outcome does not depend on what else is in the batch: each row draws from its own generator.

Adding Gumbel noise to log-probabilities and taking the largest is the same as drawing from them (Gumbel-max), so a greedy
``generate`` samples, and a run that was resumed, reordered or batched otherwise gives the same texts.
"""

import hashlib
import math

import torch
from transformers import LogitsProcessor


class RowSampler(LogitsProcessor):
    """Temperature, top-p, then Gumbel noise, row by row.

    Args:
        keys: one a row; with ``seed`` they determine the row's text.
        temperature: above 0.
        top_p: the smallest set of likeliest tokens of at least this mass is drawn from.
    """

    def __init__(self, keys: list[str], seed: int, temperature: float, top_p: float):
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(_seed(key, seed)) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores [rows, vocabulary]``, any float dtype; returned in fp32."""
        scores = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            mass = ordered.softmax(-1)
            ordered = ordered.masked_fill(mass.cumsum(-1) - mass >= self.top_p, -math.inf)
            scores = torch.empty_like(scores).scatter_(-1, order, ordered)
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=one, dtype=torch.float64) for one in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
        return scores + gumbel.to(scores.device, torch.float32)


def _seed(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1
