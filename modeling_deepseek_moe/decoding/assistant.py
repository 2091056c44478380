"""Drafts of another, smaller model with the same vocabulary (``assistant_model`` of transformers)."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.decoding.columns import Columns
from modeling_deepseek_moe.decoding.draft import Choose
from modeling_deepseek_moe.decoding.pending import Pending, first_columns


class AssistantDraft:
    """Drafts of a batch of rows that accept unlike numbers of tokens; the assistant reads what was accepted at each step.

    Args:
        model: the assistant, any language model of transformers.
        count: tokens to draft in a step, at most.
        confidence: it drafts no more where it gave the last token of every row less than this probability.
        input_ids: ``[B, S]``, the prompt.
        padding: ``[B, S]``, false where a column of the prompt is padding.

    Raises:
        ValueError: a cache with layers that forget, of which nothing can be taken back.
    """

    window: int | None = 0  # no hidden states are read

    def __init__(
        self, model: nn.Module, count: int, confidence: float, input_ids: torch.Tensor, padding: torch.Tensor | None
    ):
        self._model, self.count, self._confidence = model, count, confidence
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        for number, layer in enumerate(cache.layers):
            if type(layer) not in (DynamicLayer, DynamicIndexedLayer):
                raise ValueError(
                    f"assistant_model: layer {number}: found a {type(layer).__name__} in its cache, wanted a layer that keeps "
                    "every token: drafts are taken back"
                )
        self._device = model.device
        padding = None if padding is None else padding.to(self._device)
        self._columns = Columns(cache, len(input_ids), self._device, padding)
        self._prompt: torch.Tensor | None = input_ids.to(self._device)
        self._pending = Pending()

    def see(self, _, tokens: torch.Tensor, counts: torch.Tensor | None) -> None:
        """As `MtpDraft.see`; hidden states of the larger model are not looked at."""
        tokens = tokens.to(self._device)
        counts = None if counts is None else counts.to(self._device)
        if self._prompt is not None:
            # the first time the tokens are those after each of the prompt's new ones
            old = self._prompt.shape[1] + 1 - tokens.shape[1]
            tokens, self._prompt = torch.cat((self._prompt[:, :old], tokens), dim=1), None
        self._pending.add(first_columns(counts, tokens.shape[1]), tokens)

    def propose(self, choose: Choose) -> Iterator[torch.Tensor]:
        """As `MtpDraft.propose`."""
        counts, tokens = self._pending.take()
        rows = torch.arange(len(tokens), device=tokens.device)
        logits = self._read(tokens)[rows, (counts - 1).clamp(0)]
        self._columns.keep(counts, tokens.shape[1])
        drafted: list[torch.Tensor] = []
        while True:
            drafted.append(choose(logits, drafted))
            yield drafted[-1]
            unsure = logits.float().softmax(dim=-1)[rows, drafted[-1]] < self._confidence
            if len(drafted) == self.count or bool(unsure.all()):
                break
            logits = self._read(drafted[-1][:, None], extra=len(drafted) - 1)[:, -1]
        self._columns.take_back(len(drafted) - 1)

    def _read(self, tokens: torch.Tensor, extra: int = 0) -> torch.Tensor:
        """``[B, w, vocab_size]``, after ``extra`` columns that were written since rows were last kept."""
        new = extra + tokens.shape[1]
        mask = self._columns.mask(new)
        outputs = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=self._columns.positions(new)[:, extra:],
            use_cache=True,
            **{CACHE_NAME: self._columns.cache},
        )
        return outputs.logits
