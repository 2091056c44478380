"""The loop: draft, verify in one pass, keep what stands; rows of a batch go on at their own pace.

A step of k drafted tokens runs the model over k + 1 tokens a row, which the kernels for few tokens compute, and gives
one to k + 1. How many tokens a step drafts shrinks where the rows' longest end is near. Tokens are verified and appended one
after the other, so that a caller's processors and criteria see no text that decoding without drafts would not show them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, QuantizedCache, StoppingCriteriaList

from modeling_deepseek_moe.cache import give_layers
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.decoding.choose import Choice
from modeling_deepseek_moe.decoding.columns import Columns
from modeling_deepseek_moe.decoding.draft import Choose
from modeling_deepseek_moe.decoding.prompt import prompt_of
from modeling_deepseek_moe.decoding.rows import Rows
from modeling_deepseek_moe.decoding.verify import NOTHING, accept_greedily, accept_sampling, certain
from modeling_deepseek_moe.ops.linear import project


@dataclass
class DraftStats:
    """What a run came to. ``accepted`` of ``drafted`` tokens stood; ``steps`` passes of the model gave ``tokens``, row by row.

    What was drafted past a row's end counts as neither.
    """

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
    window: int | None  # of the prompt's hidden states it reads this many of the last ones; None: all

    def see(self, hidden_states: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor | None) -> None:
        """What a step came to, the prompt first, whether or not it drafted: see `MtpDraft.see`.

        Of a prompt there may be no hidden states before those of the ``window``.
        """

    def propose(self, choose: Choose) -> Iterator[torch.Tensor]:
        """As `MtpDraft.propose`; `NOTHING` in rows without a draft, and no call of ``choose`` for tokens that were not drawn."""


class Decoding:
    """One call of ``generate``.

    Args:
        streamer: of transformers.
        mla_path: as the model takes it.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        main: Columns,
        draft: Draft,
        samples: bool,
        choice: Choice,
        streamer=None,
        mla_path: str | None = None,
    ):
        self.model, self.rows, self.main, self.draft = model, rows, main, draft
        self.samples, self.choice, self.streamer, self.stats = samples, choice, streamer, DraftStats()
        self.mla_path = mla_path

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """One pass of the model: the hidden states ``[B, q, D]`` of new tokens ``[B, q]``."""
        new = input_ids.shape[1]
        outputs = self.model.model(
            input_ids=input_ids,
            attention_mask=self.main.mask(new),
            position_ids=None if self.main.are_full else self.main.positions(new),
            use_cache=True,
            mla_path=self.mla_path,
            **{CACHE_NAME: self.main.cache},
        )
        return outputs.last_hidden_state

    def first(self, input_ids: torch.Tensor, at_once: int | None) -> None:
        """Read the prompt, ``at_once`` tokens in a pass (``None``: all), and say the first token."""
        states: list[torch.Tensor] = []
        window = self.draft.window
        for part in input_ids.split(at_once or input_ids.shape[1], dim=1):
            states.append(self.read(part))
            self.main.keep_all(part.shape[1])
            if window is not None:  # one to say the first token with
                states = [_joined(states)[:, -max(1, window) :]]
        hidden = _joined(states)
        token = self._say(hidden[:, -1])
        self.draft.see(hidden, torch.cat((input_ids[:, 1:], token[:, None]), dim=1), None)

    def step(self, count: int) -> None:
        """Draft ``count`` tokens a row at most, verify them, and keep what stands."""
        if not count and self.rows.are_even:
            self._plain_step()
            return
        last = self.rows.last.to(self.main.used.device)
        drafted, probabilities = self._drafted(count)
        hidden = self.read(torch.cat((last, *(token.clamp(min=0)[:, None] for token in drafted)), dim=1))
        drafted.append(torch.full_like(last[:, 0], NOTHING))  # the place after the last draft
        tokens, counts = self._verify(self._logits(hidden), drafted, probabilities)
        self.main.keep(counts, len(drafted), None if self.rows.is_finished else ~self._open())
        width = tokens.shape[1]
        self._show(hidden[:, :width], tokens, counts)

    def _verify(
        self, logits: torch.Tensor, drafted: list[torch.Tensor], probabilities: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append what stands, and one token after it: tokens ``[B, w]``, of which the first ``counts [B]`` are a row's."""
        began = going = self.rows.open
        counts, said = [0] * len(began), []
        for place, draft in enumerate(drafted):
            scores = self.rows.process(logits[:, place], going)
            tokens, stand = self._compare(scores, draft, probabilities[place : place + 1])
            self._append(tokens, going)
            said.append(tokens)
            stood = [is_going and stands for is_going, stands in zip(going, stand.tolist(), strict=True)]
            counts = [count + is_going for count, is_going in zip(counts, going, strict=True)]
            self.stats.accepted += sum(stood)
            before, going = going, [is_open and stands for is_open, stands in zip(self.rows.open, stood, strict=True)]
            if not any(going) or (self.rows.go_together and going != before):
                break
        self._count(torch.stack(drafted, dim=1), began, counts)
        return torch.stack(said, dim=1), torch.tensor(counts, device=self.main.used.device)

    def _compare(
        self, scores: torch.Tensor, draft: torch.Tensor, drawn: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that the rows say, and whether they are the drafted ones; ``drawn``: the distribution of these."""
        if not self.samples:
            return accept_greedily(scores, draft)
        return accept_sampling(scores, draft, drawn[0] if drawn else certain(draft, scores.shape[-1]))

    def _plain_step(self) -> None:
        """One token of each row: what `step` comes to without a draft, in fewer operations."""
        hidden = self.read(self.rows.last.to(self.main.used.device))
        tokens = self._say(hidden[:, -1])
        batch = len(tokens)
        self.stats.steps += 1
        self.stats.row_steps += batch
        self.stats.tokens += batch
        if self.rows.is_finished or all(self.rows.open):
            self.main.keep_all(1)
        else:
            self.main.keep(torch.ones_like(tokens), 1, ~self._open())
        self._show(hidden, tokens[:, None], None)

    def _say(self, hidden: torch.Tensor) -> torch.Tensor:
        """One token ``[B]`` to each row, after hidden states ``[B, D]``; all are open."""
        asked = [True] * len(hidden)
        tokens = self._pick(self.rows.process(self._logits(hidden), asked))
        self._append(tokens, asked)
        return tokens

    def _append(self, tokens: torch.Tensor, asked: list[bool]) -> None:
        self.rows.append(tokens, asked)
        if self.streamer is not None:
            for row, is_asked in enumerate(asked):
                if is_asked:
                    self.streamer.put(tokens[row : row + 1].cpu())

    def _show(self, hidden: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor | None) -> None:
        if self.choice.pays is not False:  # else nothing is drafted any more
            self.draft.see(hidden, tokens, counts)

    def _open(self) -> torch.Tensor:
        """``[B]``: a row that has ended keeps nothing, or it would run ahead of those that go on."""
        return torch.tensor(self.rows.open, device=self.main.used.device)

    def _count(self, drafted: torch.Tensor, began: list[bool], counts: list[int]) -> None:
        real = (drafted != NOTHING).sum(1).tolist()
        self.stats.steps += 1
        self.stats.row_steps += sum(began)
        self.stats.tokens += sum(counts)
        for row, is_open in enumerate(self.rows.open):
            if began[row]:
                self.stats.drafted += real[row] if is_open else min(real[row], counts[row])

    def _drafted(self, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if not count:
            return [], []
        probabilities: list[torch.Tensor] = []
        device = self.main.used.device

        def choose(logits: torch.Tensor, ahead: list[torch.Tensor]) -> torch.Tensor:
            scores = self.rows.foresee(logits, ahead)
            if self.samples:
                probabilities.append(scores.softmax(dim=-1).to(device))
            return self._pick(scores)

        self.draft.count = count
        return [tokens.to(device) for tokens in self.draft.propose(choose)], probabilities

    def _pick(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.samples:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return project(self.model.lm_head, hidden)


def _joined(states: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(states, dim=1) if len(states) > 1 else states[0]


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

    Raises:
        ValueError: a cache that cannot give drafts back, or a prompt that rows cannot go on from.
    """
    cache = model_kwargs[CACHE_NAME]
    give_layers(cache, model.config)
    _check_cache(cache, len(input_ids))
    mask, pad = model_kwargs.get("attention_mask"), generation_config._pad_token_tensor
    mask_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    # processors and criteria are where the caller's ids are, and so are the rows
    device = input_ids.device if model.device.type == "meta" else model.device
    prompt = prompt_of(input_ids, int(cache.get_seq_length()), mask, mask_length, device)
    pad = None if pad is None else int(pad)
    rows = Rows(input_ids, generation_config.max_length, pad, logits_processor, stopping_criteria)
    main = Columns(cache, len(input_ids), device, prompt.mask)
    unread = prompt.unread
    prompt.check_positions(model_kwargs.get("position_ids"), main.positions(unread.shape[1]))
    draft = make_draft(rows, prompt.padding, prompt.cached)
    samples, mla_path = bool(generation_config.do_sample), model_kwargs.get("mla_path")
    decoding = Decoding(model, rows, main, draft, samples, choice, streamer, mla_path)
    outside = main.length - prompt.cached  # columns of the cache that the rows do not have
    decoding.first(unread, generation_config.prefill_chunk_size)
    while not rows.is_finished:
        # a pass reads a token more than it drafts
        room = rows.room if main.room is None else min(rows.room, main.room)
        with choice.step(min(choice.drafts, max(0, room - 1)), decoding.stats) as count:
            decoding.step(count)
    if streamer is not None:
        streamer.end()
    main.close([outside + length for length in rows.lengths])
    return rows.result(), decoding.stats, cache


def _check_cache(cache: Cache, batch: int) -> None:
    """
    Raises:
        ValueError: no draft can be taken back from it, or none moved to where a row ends.
    """
    if isinstance(cache, QuantizedCache) and not cache.is_croppable:
        raise ValueError(
            "found a QuantizedCache, wanted one in FP8 or another cache that gives back drafts which were not accepted"
        )
    if batch > 1 and cache.offloading:
        raise ValueError(
            f"found a {type(cache).__name__} that is offloaded, and {batch} rows that accept unlike numbers of drafts, wanted one row, or a "
            "cache that stays on the device"
        )
