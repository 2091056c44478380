"""The draft: each MTP layer says one token more (V3 report, 2.2), the last of them again where more are asked for.

Layer j reads at position i the hidden state of layer j - 1 (of the model, for the first) and token i + 1 + j. What it caches
for the last j positions comes of drafted tokens: they are read once more in the next step, when it is known which tokens follow.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from modeling_deepseek_moe.cache import IndexedLatentLayer, LatentLayer
from modeling_deepseek_moe.decoding.columns import Columns
from modeling_deepseek_moe.decoding.pending import Pending, first_columns

Choose = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


class DraftCache(DynamicCache):
    """The latents of one MTP layer, whichever number the layer has in the model."""

    def __init__(self, with_indexer: bool):
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [IndexedLatentLayer() if with_indexer else LatentLayer()]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states, value_states, 0, *args, **kwargs)

    def update_indexer(self, indexer_key_states, layer_idx, *args, **kwargs):
        return super().update_indexer(indexer_key_states, 0, *args, **kwargs)


class MtpDraft:
    """Drafts of a batch of rows that accept unlike numbers of tokens.

    Args:
        model: a `DeepseekMoeForCausalLM` with MTP layers.
        count: tokens to draft in a step.
        padding: as `Columns`, of the tokens that are seen first.
        window: of these, how many of the last ones are read, and how many steps may go by without a draft before the layers
            begin over with the last of them; ``None``: all. Hidden states know what was before.
    """

    def __init__(self, model: nn.Module, count: int, padding: torch.Tensor | None, window: int | None = None):
        self._model, self.count, self._padding, self.window = model, count, padding, window
        self._depth = min(count, len(model.model.mtp_layers))
        self._pending = Pending(window)
        self._columns: list[Columns] = []
        self._kept: list[torch.Tensor | None] = []

    def see(self, hidden_states: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Keep what a step came to until it is read for the next draft.

        Args:
            hidden_states: ``[B, w, D]``, the model's at positions whose next token is known; the last ``window`` suffice.
            tokens: ``[B, w]``, those next tokens; of row b the first ``counts[b]`` count, all where ``counts`` is ``None``.
        """
        own = first_columns(counts, tokens.shape[1]) if self._padding is None else self._padding
        self._padding = None
        if self.window is not None and tokens.shape[1] > self.window:
            # copies: a view would hold the states of the whole prompt
            own = None if own is None else own[:, -self.window :]
            hidden_states, tokens = hidden_states[:, -self.window :].clone(), tokens[:, -self.window :].clone()
        if self._pending.add(own, hidden_states, tokens):
            self._columns = []

    def propose(self, choose: Choose) -> Iterator[torch.Tensor]:
        """Read what was accepted, and yield the drafted tokens ``[B]`` one after the other.

        Args:
            choose: logits ``[B, vocab_size]`` and the tokens drafted so far → a token of each row.
        """
        counts, hidden_states, tokens = self._pending.take()
        if not self._columns:
            self._begin(len(tokens), tokens.device)
        rows = torch.arange(len(tokens), device=tokens.device)
        drafted: list[torch.Tensor] = []
        kept: list[torch.Tensor | None] = [None]
        for depth, columns in enumerate(self._columns[: self.count]):
            begun = not depth or self._kept[depth] is not None
            if depth and begun:
                hidden_states = torch.cat((self._kept[depth], hidden_states), dim=1)
            width = hidden_states.shape[1]
            known = counts if begun else (counts - depth).clamp(min=0)
            following = _following(tokens if begun else tokens[:, depth:], known, drafted, width)
            hidden_states = self._run(depth, columns, following, hidden_states)
            last = (known + depth - 1).clamp(0, width - 1)
            if depth + 1 < min(self.count, len(self._columns)):
                # of the last position whose next tokens are all accepted: the next layer begins with it in the next step
                kept.append(hidden_states[rows, (known - 1).clamp(0)][:, None])
            columns.keep(known, width)
            drafted.append(choose(self._logits(depth, hidden_states[rows, last]), drafted))
            yield drafted[-1]
        self._kept[: len(kept)] = kept
        state, extra = hidden_states[rows, last][:, None], 0
        while len(drafted) < self.count:
            state = self._run(depth, columns, drafted[-1][:, None], state, extra, ahead=depth)
            extra += 1
            drafted.append(choose(self._logits(depth, state[:, 0]), drafted))
            yield drafted[-1]
        columns.take_back(extra)

    def _begin(self, batch: int, device: torch.device) -> None:
        """Layers that have read nothing."""
        with_indexer = self._model.config.has_indexers
        self._columns = [Columns(DraftCache(with_indexer), batch, device) for _ in range(self._depth)]
        self._kept = [None] * self._depth

    def _run(
        self, depth: int, columns: Columns, tokens, hidden_states, extra: int = 0, ahead: int = 0
    ) -> torch.Tensor:
        """
        Args:
            extra: columns that were written since rows were last kept.
            ahead: positions between what is kept and these tokens that are left out.
        """
        columns_new = extra + tokens.shape[1]
        return self._model.model.mtp(
            depth,
            tokens,
            hidden_states,
            attention_mask=columns.mask(columns_new),
            position_ids=columns.positions(columns_new)[:, extra:] + ahead,
            cache=columns.cache,
        )

    def _logits(self, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._model.mtp_head(depth, hidden_states)


def _following(tokens: torch.Tensor, known: torch.Tensor, drafted: list[torch.Tensor], width: int) -> torch.Tensor:
    """``[B, width]``: a row's ``known`` tokens and those ``drafted`` after them."""
    missing = max(0, width + len(drafted) - tokens.shape[1])
    following = torch.cat((tokens, tokens.new_zeros(len(tokens), missing)), dim=1)
    for ahead, token in enumerate(drafted):
        following.scatter_(1, (known + ahead)[:, None], token[:, None])
    return following[:, :width]
