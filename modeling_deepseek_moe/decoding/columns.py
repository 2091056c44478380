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
        # of rows that have ended: the columns that are still theirs
        self._ended = torch.zeros_like(self.used, dtype=torch.bool)
        self._held = self.used

    @property
    def room(self) -> int | None:
        """Columns that can be written; ``None``: any number."""
        size = self.cache.get_max_length()
        return None if size < 0 else size - self.length

    @property
    def are_full(self) -> bool:
        """Whether every column of every row counts: what a model takes for granted."""
        return self.padding is None and not self.is_ragged

    def mask(self, new: int) -> torch.Tensor | None:
        """``[B, length + new]`` for a pass of ``new`` tokens a row; ``None`` where every column counts."""
        if self.are_full:
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

    def keep(self, counts: torch.Tensor, written: int, ended: torch.Tensor | None = None) -> None:
        """Of the ``written`` columns of the last pass the first ``counts [B]`` become the rows'.

        Args:
            ended: ``[B]``, true for rows that nothing is read for any more: they leave their columns to the others.
        """
        if self.is_ragged:
            self._move(counts, written)
        self.used = self.used + counts
        # this pass wrote its columns from `length` on, into those of rows that had ended too
        self._held = torch.where(self._ended, self._held.clamp(max=self.length), self.used)
        if ended is not None:
            self._ended = ended
            self.used = self.used.masked_fill(ended, 0)
        longest = int(self.used.max())
        self._take_away(self.length + written - longest)
        self.length = longest
        self.is_ragged = bool((self.used != longest).any())

    def keep_all(self, written: int) -> None:
        """As `keep`, of rows of one length that have not ended, and keep all of the last pass."""
        self.used = self._held = self.used + written
        self.length += written

    def close(self, lengths: list[int]) -> None:
        """Leave the columns that hold tokens of every row, as a cache has them between two calls: it may be continued.

        Args:
            lengths: of the rows' text. The last token of the longest is not in a cache yet.
        """
        held = min(*self._held.tolist(), *lengths, max(lengths) - 1)
        self._take_away(self.length - held)
        self.length = held

    def take_back(self, written: int) -> None:
        """None of the last ``written`` columns become the rows'."""
        self._take_away(written)

    def _move(self, counts: torch.Tensor, written: int) -> None:
        index = torch.arange(written, device=self.used.device)
        # what is not kept stays where it is: two columns never go to one place
        to = torch.where(index < counts[:, None], self.used[:, None] + index, self.length + index)[:, None, :, None]
        for layer in self.cache.layers:
            to = to.to(layer.keys.device)
            for states in (layer.keys, layer.values):
                new = states[:, :, self.length : self.length + written].clone()
                states.scatter_(2, to.expand_as(new), new)
            if getattr(layer, "is_indexer_initialized", False):
                new = layer.indexer_keys[:, self.length : self.length + written].clone()
                layer.indexer_keys.scatter_(1, to[:, 0].expand_as(new), new)

    def _take_away(self, columns: int) -> None:
        if columns <= 0:
            return
        for layer in self.cache.layers:
            if isinstance(layer, LatentLayer):
                layer.advance(layer.get_seq_length() - columns)  # `crop` would make the next update copy all
            elif isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.sub_(columns)  # a static layer's, as its `crop` does since 5.24
                if getattr(layer, "is_indexer_initialized", False):
                    layer.indexer_cumulative_length.sub_(columns)
            else:
                layer.crop(-columns)
