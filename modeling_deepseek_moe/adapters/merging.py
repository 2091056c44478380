"""Adding a difference to a weight that is codes: blocks that it changes get new codes and a new scale, others keep theirs.

Legend: N, K rows and columns of a weight.
"""

import math
from dataclasses import dataclass

import torch
from transformers.utils import logging

from modeling_deepseek_moe.formats.row import Scales, WeightFormat
from modeling_deepseek_moe.ops.four_bit import NestedScales

logger = logging.get_logger(__name__)


@dataclass
class Merge:
    """What a model's adapters lost where they were merged into codes, since it was last said."""

    blocks: int = 0
    touched: int = 0
    error: float = 0.0  # sums of squares, of what is lost, of the differences and of the weights that are touched
    difference: float = 0.0
    weight: float = 0.0

    def report(self) -> None:
        """One line of what was merged since the last one."""
        if self.blocks:
            logger.warning(
                f"Merged an adapter into codes: {self.touched} of {self.blocks} blocks have new ones. Rounding them lost "
                f"{_share(self.error, self.weight)} of their weights, which is {_share(self.error, self.difference)} of what "
                "the adapter adds."
            )
        self.blocks = self.touched = 0
        self.error = self.difference = self.weight = 0.0


def copy_of(codes: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, Scales]:
    """Of a matrix's tensors, nested scales' table and offset apart, which no merge changes."""
    if isinstance(scales, NestedScales):
        return codes.clone(), scales._replace(codes=scales.codes.clone(), absmax=scales.absmax.clone())
    return codes.clone(), scales.clone()


def write_over(codes: torch.Tensor, scales: Scales, new: tuple[torch.Tensor, Scales]) -> None:
    """A matrix's tensors with what they are now, where they lie."""
    with torch.no_grad():
        for mine, value in zip((codes, *_changing(scales)), (new[0], *_changing(new[1])), strict=True):
            mine.view(torch.uint8).copy_(value.to(mine.dtype).contiguous().view(torch.uint8))


def _changing(scales: Scales) -> tuple[torch.Tensor, ...]:
    return (scales.codes, scales.absmax) if isinstance(scales, NestedScales) else (scales,)


def add_to_codes(
    weight_format: WeightFormat,
    codes: torch.Tensor,
    scales: Scales,
    difference: torch.Tensor,
    merge: Merge | None = None,
) -> tuple[torch.Tensor, Scales]:
    """Codes and scales of a matrix with ``difference [N, K]`` fp32 added, as fresh tensors; ``merge`` gets the loss added.

    Raises:
        ValueError: the sum is not finite.
    """
    if not difference.any():
        return copy_of(codes, scales)
    wanted = weight_format.dequantize(codes, scales, torch.float32).add_(difference)
    codes, scales, touched = weight_format.requantize(codes, scales, wanted)
    if merge is not None:
        in_values = weight_format.values_of(touched, tuple(wanted.shape))
        merge.blocks += touched.numel()
        merge.touched += int(touched.sum())
        merge.error += _squares(weight_format.dequantize(codes, scales, torch.float32) - wanted)
        merge.difference += _squares(difference)
        merge.weight += _squares(wanted[in_values])
    return copy_of(codes, scales)


def _squares(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _share(part: float, whole: float) -> str:
    return f"{100 * math.sqrt(part / whole):.2g} %" if whole else "0 %"
