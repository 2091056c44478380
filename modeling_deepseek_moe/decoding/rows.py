"""The rows of text that are being written: their tokens, what the caller's processors and criteria say of each."""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# where transformers' own processors and criteria are
OWN_MODULES = (LogitsProcessor.__module__, StoppingCriteria.__module__)
# of the processors, those that call a function of the caller's, or remember what they were shown
NOT_OF_TEXT_ALONE = (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class Rows:
    """``tokens [B, max_length]``, of which row b has ``lengths[b]``; past its end a row has padding.

    Processors and criteria of transformers take rows of one length. They are shown the whole batch, cut to the length of some
    rows, and asked about these: some know a row by its place. So rows of unlike lengths want processors that say of a row what
    its text tells them, whatever the others are, and however often they are asked. Those of transformers are such (a limit of
    time looks at no text); a caller's own need not be. Where there is one, rows `go_together`, and each processor and criterion is
    called as it is without drafts.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        pad_token_id: int | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ):
        batch, length = input_ids.shape
        self._limit, self._pad = max(max_length, length), pad_token_id or 0
        self.tokens = input_ids.new_full((batch, self._limit), self._pad)
        self.tokens[:, :length] = input_ids
        self.lengths = [length] * batch
        self._processors, self._criteria = processors, criteria
        self._of_text_alone = LogitsProcessorList(filter(_is_of_text_alone, processors))
        self.go_together = not all(map(_is_of_text_alone, (*processors, *criteria)))
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

    def process(self, scores: torch.Tensor, asked: list[bool]) -> torch.Tensor:
        """``scores [B, vocab_size]`` of the next token in fp32, as the processors want them in the rows ``asked`` for."""
        return self._processed(self._processors, scores, asked, [])

    def foresee(self, scores: torch.Tensor, ahead: list[torch.Tensor]) -> torch.Tensor:
        """As `process`, after drafted tokens ``ahead``, by those processors that may be shown what no text may come to."""
        return self._processed(self._of_text_alone, scores, self.open, ahead)

    def append(self, tokens: torch.Tensor, asked: list[bool]) -> None:
        """One of ``tokens [B]`` to each row ``asked`` for, which are open."""
        tokens = tokens.to(self.tokens)
        for length, rows in self._by_length(asked).items():
            self.tokens[rows, length] = tokens[rows]
            ends = self._criteria(self.tokens[:, : length + 1], None).tolist()
            for row in rows:
                self.lengths[row] = length + 1
                if ends[row] and self._stops[row] is None:
                    self._stops[row] = length + 1

    def result(self) -> torch.Tensor:
        """``[B, length of the longest row]``, padded on the right."""
        return self.tokens[:, : max(stop or 0 for stop in self._stops) or max(self.lengths)].clone()

    def _processed(self, processors: LogitsProcessorList, scores, asked: list[bool], ahead) -> torch.Tensor:
        scores = scores.float()
        if not processors:
            return scores
        of_model = scores.to(self.tokens.device)
        processed = of_model.clone()
        for length, rows in self._by_length(asked).items():
            text = torch.cat((self.tokens[:, :length], *(token.to(self.tokens)[:, None] for token in ahead)), dim=1)
            # a copy: processors may write to what they are given
            processed[rows] = processors(text, of_model.clone())[rows]
        return processed.to(scores.device)

    def _by_length(self, asked: list[bool]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            if asked[row]:
                found.setdefault(length, []).append(row)
        return found


def _is_of_text_alone(asked: LogitsProcessor | StoppingCriteria) -> bool:
    return type(asked).__module__ in OWN_MODULES and not isinstance(asked, NOT_OF_TEXT_ALONE)
