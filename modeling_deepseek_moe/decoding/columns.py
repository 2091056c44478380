"""A cache whose rows hold unlike numbers of tokens: those of a row are dense from its first to its last.

A pass writes its q new columns at the end of the longest row. `Columns.keep` then moves what a row accepted to where
the row ends, a few columns a step, and takes the rest away, so that no cache grows beyond its longest row. Between a row's
end and the new columns lie stale ones, which the mask leaves out.
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from modeling_deepseek_moe.cache import LatentLayer


class Columns:
    """Which columns of a cache are a row's: ``used [B]`` at its beginning, padding left out.

    Args:
        cache: empty, or with as many columns in each row as ``padding`` has more than the first pass has tokens.
        padding: ``[B, S]``, false where a column of the prompt is padding; ``None``: none is.
    """

    def __init__(self, cache: Cache, batch: int, device: torch.device, padding: torch.Tensor | None = None):
        self.cache, self.padding = cache, padding
        length = int(cache.get_seq_length())
        self.length = length
        self.used = torch.full((batch,), length, dtype=torch.long, device=device)
        self.is_ragged = False

    def mask(self, new: int) -> torch.Tensor | None:
        """``[B, length + new]`` for a pass of ``new`` tokens a row; ``None`` where every column counts."""
        if self.padding is None and not self.is_ragged:
            return None
        column = torch.arange(self.length + new, device=self.used.device)
        valid = (column < self.used[:, None]) | (column >= self.length)
        if self.padding is not None:
            known = min(self.padding.shape[1], len(column))
            valid[:, :known] &= self.padding[:, :known]
        return valid.long()

    def positions(self, new: int) -> torch.Tensor:
        """``[B, new]`` of the tokens of the next pass: how many a row has before each, padding not counted."""
        positions = self.used[:, None] + torch.arange(new, device=self.used.device)
        if self.padding is not None:
            before = F.pad((~self.padding).cumsum(1), (1, 0))  # padding before a column of the prompt
            positions = positions - before.gather(1, positions.clamp(max=self.padding.shape[1]))
        return positions.clamp(min=0)

    def keep(self, counts: torch.Tensor, written: int) -> None:
        """Of the ``written`` columns of the last pass the first ``counts [B]`` become the rows'."""
        if self.is_ragged:
            self._move(counts, written)
        self.used = self.used + counts
        longest = int(self.used.max())
        self._take_away(self.length + written - longest)
        self.length = longest
        self.is_ragged = bool((self.used != longest).any())

    def take_back(self, written: int) -> None:
        """None of the last ``written`` columns become the rows'."""
        self._take_away(written)

    def _move(self, counts: torch.Tensor, written: int) -> None:
        index = torch.arange(written, device=self.used.device)
        # what is not kept stays where it is: two columns never go to one place
        to = torch.where(index < counts[:, None], self.used[:, None] + index, self.length + index)[:, None, :, None]
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                new = states[:, :, self.length : self.length + written].clone()
                states.scatter_(2, to.expand_as(new), new)

    def _take_away(self, columns: int) -> None:
        if columns <= 0:
            return
        for layer in self.cache.layers:
            if isinstance(layer, LatentLayer):
                layer.advance(layer.get_seq_length() - columns)  # `crop` would make the next update copy all
            elif isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.sub_(columns)  # a static layer's, as its `crop` does since 5.24
            else:
                layer.crop(-columns)
