"""The rows of text that are being written: their tokens, what the caller's processors and criteria say of each."""

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList


class Rows:
    """``tokens [B, max_length]``, of which row b has ``lengths[b]``.

    Processors and criteria of transformers take rows of one length. They are shown the whole batch, cut to the length of some
    rows, and asked about these: some know a row by its place. Past its end a row has scratch.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        pad_token_id: int | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        scratch: int,
    ):
        batch, length = input_ids.shape
        self._limit, self._pad = max(max_length, length), pad_token_id or 0
        self.tokens = input_ids.new_full((batch, self._limit + scratch), self._pad)
        self.tokens[:, :length] = input_ids
        self.lengths = [length] * batch
        self._processors, self._criteria = processors, criteria
        # as in `generate`: without a token that ends a text every row goes on until the last one may stop
        self._ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._stops: list[int | None] = [None] * batch

    @property
    def last(self) -> torch.Tensor:
        """``[B, 1]``."""
        longest = max(self.lengths)
        if longest == min(self.lengths):
            return self.tokens[:, longest - 1 : longest]
        index = torch.tensor(self.lengths, device=self.tokens.device) - 1
        return self.tokens.gather(1, index[:, None])

    @property
    def is_finished(self) -> bool:
        if any(stop is None for stop in self._stops):
            return False
        return self._ends_rows or min(self.lengths) >= max(self._stops)

    @property
    def open(self) -> list[bool]:
        """Which rows take more tokens."""
        return [
            length < self._limit and not (self._ends_rows and stop is not None)
            for length, stop in zip(self.lengths, self._stops, strict=True)
        ]

    @property
    def are_even(self) -> bool:
        """Whether all take more tokens, and are of one length."""
        return max(self.lengths) == min(self.lengths) and all(self.open)

    @property
    def room(self) -> int:
        """Tokens that the shortest open row takes."""
        return self._limit - min(length for length, is_open in zip(self.lengths, self.open, strict=True) if is_open)

    def process(self, scores: torch.Tensor, ahead: list[torch.Tensor]) -> torch.Tensor:
        """``scores [B, vocab_size]`` of the next token in fp32, as the processors want them after the tokens ``ahead``."""
        scores = scores.float()
        if not self._processors:
            return scores
        if not ahead and max(self.lengths) == min(self.lengths):
            return self._processors(self.tokens[:, : self.lengths[0]], scores.clone())
        processed = torch.empty_like(scores)
        for length in set(self.lengths):
            of_length = [row for row, other in enumerate(self.lengths) if other == length]
            end = length + len(ahead)
            for index, tokens in enumerate(ahead):
                self.tokens[of_length, length + index] = tokens[of_length]
            # a copy: processors may write to what they are given
            processed[of_length] = self._processors(self.tokens[:, :end], scores.clone())[of_length]
        return processed

    def add(self, row: int, tokens: list[int]) -> list[int]:
        """Append ``tokens`` to a row up to where it ends; returns those that were appended."""
        added = []
        for token in tokens:
            length = self.lengths[row]
            if not self.open[row]:
                break
            self.tokens[row, length] = token
            self.lengths[row] = length + 1
            added.append(token)
            if self._stops[row] is None and bool(self._criteria(self.tokens[:, : length + 1], None)[row]):
                self._stops[row] = length + 1
        return added

    def add_column(self, tokens: torch.Tensor) -> None:
        """Append ``tokens [B]`` to rows that `are_even`."""
        length = self.lengths[0]
        self.tokens[:, length] = tokens
        self.lengths = [length + 1] * len(self.lengths)
        ends = self._criteria(self.tokens[:, : length + 1], None).tolist()
        for row, is_end in enumerate(ends):
            if is_end and self._stops[row] is None:
                self._stops[row] = length + 1

    def result(self) -> torch.Tensor:
        """``[B, length of the longest row]``, padded on the right."""
        length = max(stop or 0 for stop in self._stops) or max(self.lengths)
        column = torch.arange(length, device=self.tokens.device)
        ends = torch.tensor(self.lengths, device=self.tokens.device)
        return self.tokens[:, :length].masked_fill(column >= ends[:, None], self._pad)
