"""The loop: draft, verify in one pass, keep what stands; rows of a batch go on at their own pace.

A step of k drafted tokens runs the model over k + 1 tokens a row, which the kernels for few tokens compute, and gives
one to k + 1. How many tokens a step drafts shrinks where the rows' longest end is near.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, QuantizedCache, StoppingCriteriaList

from modeling_deepseek_moe.cache import give_layers
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.decoding.choose import Choice
from modeling_deepseek_moe.decoding.columns import Columns
from modeling_deepseek_moe.decoding.draft import Choose
from modeling_deepseek_moe.decoding.rows import Rows
from modeling_deepseek_moe.decoding.verify import accept_greedily, accept_sampling, certain
from modeling_deepseek_moe.ops.linear import project


@dataclass
class DraftStats:
    """What a run came to. ``accepted`` of ``drafted`` tokens stood; ``steps`` passes of the model gave ``tokens``, row by row."""

    steps: int = 0
    row_steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    reason: str | None = None  # why nothing was drafted from the start

    @property
    def tokens_per_pass(self) -> float:
        """Of a row that is still being written."""
        return self.tokens / self.row_steps if self.row_steps else 1.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Draft(Protocol):
    """Where drafts come from."""

    count: int  # tokens to draft in a step, at most

    def see(self, hidden_states: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor | None) -> None:
        """What a step came to, the prompt first, whether or not it drafted: see `MtpDraft.see`."""

    def propose(self, choose: Choose) -> Iterator[torch.Tensor]:
        """As `MtpDraft.propose`; without a call of ``choose`` for a token that was not drawn from anything."""


class Decoding:
    """One call of ``generate``."""

    def __init__(self, model: nn.Module, rows: Rows, main: Columns, draft: Draft, samples: bool, choice: Choice):
        self.model, self.rows, self.main, self.draft = model, rows, main, draft
        self.samples, self.choice, self.stats = samples, choice, DraftStats()

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """One pass of the model: the hidden states ``[B, q, D]`` of new tokens ``[B, q]``."""
        new = input_ids.shape[1]
        mask = self.main.mask(new)
        if mask is not None:
            mask = mask.to(input_ids.device)
        outputs = self.model.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=None if self.main.are_full else self.main.positions(new),
            use_cache=True,
            **{CACHE_NAME: self.main.cache},
        )
        return outputs.last_hidden_state

    def first(self, input_ids: torch.Tensor, put: Callable) -> None:
        """Read the prompt, and say the first token."""
        hidden = self.read(input_ids)
        batch, length = input_ids.shape
        counts = torch.full((batch,), length, device=input_ids.device)
        self.main.keep(counts, length)
        token = self._pick(self.rows.process(self._logits(hidden[:, -1]), []))
        following = torch.cat((input_ids[:, 1:], token[:, None]), dim=1)
        self.draft.see(hidden, following, None)
        for row in range(batch):
            put(row, self.rows.add(row, [int(token[row])]))

    def step(self, count: int, put: Callable) -> None:
        """Draft ``count`` tokens a row at most, verify them, and keep what stands."""
        if not count and self.rows.are_even:
            self._plain_step(put)
            return
        last = self.rows.last
        drafted, probabilities = self._drafted(count)
        count = len(drafted)
        hidden = self.read(torch.cat((last, *(token[:, None] for token in drafted)), dim=1))
        logits = self._logits(hidden)
        scores = torch.stack([self.rows.process(logits[:, i], drafted[:i]) for i in range(count + 1)], dim=1)
        tokens = torch.stack(drafted, dim=1) if drafted else last[:, :0]
        if not self.samples:
            accepted, after = accept_greedily(scores, tokens)
        elif drafted:
            drawn = torch.stack(probabilities, dim=1) if probabilities else certain(tokens, scores.shape[-1])
            accepted, after = accept_sampling(scores, tokens, drawn)
        else:
            accepted, after = torch.zeros_like(last[:, 0]), self._pick(scores[:, 0])
        counts = (accepted + 1) * self._open()
        new = torch.cat((tokens, after[:, None]), dim=1).scatter(1, accepted[:, None], after[:, None])
        self._write(new.tolist(), counts.tolist(), count, put)
        self.main.keep(counts, count + 1, None if self.rows.is_finished else ~self._open())
        width = int(counts.max())
        self._show(hidden[:, :width], new[:, :width], counts)

    def _plain_step(self, put: Callable) -> None:
        """One token of each row: what `step` comes to without a draft, in fewer operations."""
        hidden = self.read(self.rows.last)
        tokens = self._pick(self.rows.process(self._logits(hidden[:, -1]), []))
        self.rows.add_column(tokens)
        for row, token in enumerate(tokens.tolist()):
            put(row, [token])
        batch = len(tokens)
        self.stats.steps += 1
        self.stats.row_steps += batch
        self.stats.tokens += batch
        if self.rows.is_finished or all(self.rows.open):
            self.main.keep_all(1)
        else:
            self.main.keep(torch.ones_like(tokens), 1, ~self._open())
        self._show(hidden, tokens[:, None], None)

    def _show(self, hidden: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor | None) -> None:
        if self.choice.pays is not False:  # else nothing is drafted any more
            self.draft.see(hidden, tokens, counts)

    def _open(self) -> torch.Tensor:
        """``[B]``: a row that has ended keeps nothing, or it would run ahead of those that go on."""
        return torch.tensor(self.rows.open, device=self.main.used.device)

    def _write(self, tokens: list[list[int]], counts: list[int], drafted: int, put: Callable) -> None:
        self.stats.steps += 1
        for row, count in enumerate(counts):
            added = self.rows.add(row, tokens[row][:count])
            if added:
                put(row, added)
                self.stats.row_steps += 1
                self.stats.tokens += len(added)
                self.stats.drafted += drafted
                self.stats.accepted += count - 1

    def _drafted(self, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if not count:
            return [], []
        probabilities: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, ahead: list[torch.Tensor]) -> torch.Tensor:
            scores = self.rows.process(logits, ahead)
            if not self.samples:
                return scores.argmax(dim=-1)
            probabilities.append(scores.softmax(dim=-1))
            return torch.multinomial(probabilities[-1], 1)[:, 0]

        self.draft.count = count
        return list(self.draft.propose(choose)), probabilities

    def _pick(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.samples:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return project(self.model.lm_head, hidden)


def decode(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    choice: Choice,
    make_draft: Callable[[Rows, torch.Tensor | None, int], Draft],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer=None,
    **model_kwargs,
) -> tuple[torch.Tensor, DraftStats, object]:
    """A `transformers` decoding method.

    Args:
        choice: how many tokens a step drafts.
        make_draft: of the rows, which columns ``[B, S]`` of the prompt count (``None``: all) and how many are cached already.

    Returns:
        Tokens ``[B, T]``, what it came to, and the cache.
    """
    cache = model_kwargs[CACHE_NAME]
    give_layers(cache, model.config)
    if isinstance(cache, QuantizedCache) and not cache.is_croppable:
        raise ValueError(
            "found a QuantizedCache, wanted one in FP8 or another cache that gives back drafts which were not accepted"
        )
    batch, device = len(input_ids), input_ids.device
    past = int(cache.get_seq_length())
    mask = model_kwargs.get("attention_mask")
    padding = None if mask is None or bool(mask.all()) else mask.bool()
    pad = generation_config._pad_token_tensor
    limit = generation_config.max_length
    pad = None if pad is None else int(pad)
    rows = Rows(input_ids, limit, pad, logits_processor, stopping_criteria, choice.drafts + 1)
    main = Columns(cache, batch, device, padding)
    draft = make_draft(rows, padding, past)
    decoding = Decoding(model, rows, main, draft, bool(generation_config.do_sample), choice)
    put = partial(_put, streamer)
    decoding.first(input_ids[:, past:], put)
    while not rows.is_finished:
        # a pass reads a token more than it drafts
        room = rows.room if main.room is None else min(rows.room, main.room)
        with choice.step(min(choice.drafts, max(0, room - 1)), decoding.stats) as count:
            decoding.step(count, put)
    if streamer is not None:
        streamer.end()
    main.close(rows.lengths)
    return rows.result(), decoding.stats, cache


def _put(streamer, row: int, tokens: list[int]) -> None:
    if streamer is not None:
        for token in tokens:
            streamer.put(torch.tensor([token]))
