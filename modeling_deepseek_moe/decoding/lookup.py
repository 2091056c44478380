"""Drafts looked up in the text itself: what followed the last tokens of a row where they stood before."""

from collections.abc import Iterator

import torch

from modeling_deepseek_moe.decoding.rows import Rows
from modeling_deepseek_moe.decoding.verify import NOTHING


class LookupDraft:
    """Drafts of a batch of rows, each from its own text (``prompt_lookup_num_tokens`` of transformers).

    Args:
        count: tokens to draft in a step, at most.
        ngram: the longest run of last tokens that is looked for; shorter ones are taken where it is not found.
        padding: ``[B, S]``, false where a column of the prompt is padding.
    """

    window: int | None = 0  # no hidden states are read

    def __init__(self, rows: Rows, count: int, ngram: int, padding: torch.Tensor | None):
        self._rows, self.count, self._ngram = rows, count, ngram
        self._starts = [0] * len(rows.tokens)
        if padding is not None:
            self._starts = padding.int().argmax(dim=1).tolist()

    def see(self, *_) -> None:
        """Nothing: the rows have the text."""

    def propose(self, *_) -> Iterator[torch.Tensor]:
        """Yields the drafted tokens ``[B]`` one after the other, `NOTHING` where a row has fewer; none where no row has any."""
        tokens = self._rows.tokens
        found = [
            self._following(tokens[row, start:length]) if is_open else tokens[row, :0]
            for row, (start, length, is_open) in enumerate(
                zip(self._starts, self._rows.lengths, self._rows.open, strict=True)
            )
        ]
        drafted = tokens.new_full((len(found), max(map(len, found))), NOTHING)
        for row, candidates in enumerate(found):
            drafted[row, : len(candidates)] = candidates
        yield from drafted.unbind(1)

    def _following(self, text: torch.Tensor) -> torch.Tensor:
        """Up to ``count`` tokens that followed the last ones of ``text [S]`` where they first stood."""
        for size in range(min(self._ngram, len(text) - 1), 0, -1):
            windows = text[:-1].unfold(0, size, 1)  # of the last tokens themselves nothing follows
            places = (windows == text[-size:]).all(dim=1).nonzero()
            if len(places):
                start = int(places[0]) + size
                return text[start : start + self.count]
        return text[:0]
