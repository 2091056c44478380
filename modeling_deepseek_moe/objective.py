"""The loss of one pass in training: next token, multi-token prediction, balance (DeepSeek-V3 report, 2.1.2 and 2.2).

L = CE + λ/D · Σ_k CE_k + α Σ_layers Σ_i f_i P_i.
"""

import contextlib

import torch
from torch import nn

from modeling_deepseek_moe.indexer_loss import DENSE
from modeling_deepseek_moe.moe.training_state import TrainingPass, sequence_ids
from modeling_deepseek_moe.mtp import shifted

IGNORE = -100  # a label that asks for nothing, as everywhere in transformers
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels")


class Objective:
    """The loss of one forward pass of a causal language model with a `TrainingState`.

    All parts are means over the labels of the whole batch: where ``num_items_in_batch`` is given they are sums divided
    by it, so that micro-batches and ranks add up. Without a label there is a loss of 0, and no gradient but 0.

    Args:
        arguments: the other arguments of the model's ``forward``.

    Raises:
        ValueError: an MTP loss without ``input_ids`` or without MTP layers.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        arguments: dict,
    ):
        self.model, self.state = model, model.model.training_state
        self.input_ids, self.arguments = input_ids, dict(arguments)
        self.masks = {"attention_mask": attention_mask, "position_ids": position_ids}
        if self.state.mtp_weight and (input_ids is None or not len(model.model.mtp_layers)):
            missing = "inputs_embeds only" if input_ids is None else "a model without MTP layers"
            raise ValueError(f"mtp_weight={self.state.mtp_weight}: found {missing}, wanted input_ids and an MTP layer")
        self.labels = labels
        shift_labels = arguments.get("shift_labels")
        self.next_labels = shifted(labels, 1, IGNORE) if shift_labels is None else shift_labels
        wanted = self.next_labels != IGNORE
        items = arguments.get("num_items_in_batch")
        items = wanted.sum() if items is None else torch.as_tensor(items, device=labels.device)
        self.items = items.clamp_min(1)
        self.sequences = sequence_ids(labels.shape, labels.device, **self.masks)
        self.training_pass = TrainingPass(self.state, self.sequences, wanted, self.items)
        self.state.add("tokens", self.training_pass.token_mask.sum())
        self.state.add("balance_loss_labels", wanted.sum())

    def graph(self) -> contextlib.AbstractContextManager:
        """For what leads to the model's own losses: without gradients where it is not to learn from them, only its indexers."""
        return torch.no_grad() if self._is_warm_up else contextlib.nullcontext()

    @property
    def _is_warm_up(self) -> bool:
        return self.state.indexer_stage == DENSE

    def loss(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and the value of the balance loss, which in the dense stage is no part of it, as no other is but the indexers'.

        Args:
            logits: ``[B, S, vocab_size]``.
            hidden_states: ``[B, S, hidden_size]``, after the final norm.
        """
        with self.graph():
            loss = self._cross_entropy("lm_loss", logits, self.next_labels)
            if self.state.mtp_weight:
                loss = loss + self.state.mtp_weight * self._mtp(hidden_states)
        loss = self.training_pass.close(loss)
        balance = self.training_pass.balance_loss
        if balance is None:
            return loss, None
        self.state.add("balance_loss", balance * self.items)
        return loss if self._is_warm_up else loss + balance, balance

    def _mtp(self, hidden_states: torch.Tensor) -> torch.Tensor | float:
        """``1/D · Σ_k CE_k`` (eq. 24 and 25, without λ)."""
        sequence, count = self.sequences
        total: torch.Tensor | float = 0.0
        depths = len(self.model.model.mtp_layers)
        rest = {name: value for name, value in self.arguments.items() if name not in LOSS_ARGUMENTS}
        for depth in range(depths):
            # the token that is embedded, and the one that is predicted, must be of the sequence of the hidden state
            offset = depth + 1
            same = shifted(sequence, offset, -1) == sequence
            mtp_pass = self.training_pass.masked((sequence < count) & same)
            tokens = shifted(self.input_ids, offset, 0)
            logits, hidden_states = self.model.mtp_logits(
                depth, tokens, hidden_states, **self.masks, **rest, training_pass=mtp_pass
            )
            same = shifted(sequence, offset + 1, -1) == sequence
            labels = shifted(self.labels, offset + 1, IGNORE).masked_fill(~same, IGNORE)
            total = total + self._cross_entropy("mtp_loss", logits, labels) / depths
        return total

    def _cross_entropy(self, name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        arguments = self.arguments | {"num_items_in_batch": self.items, "shift_labels": labels.contiguous()}
        loss = self.model.loss_function(
            logits=logits, labels=None, vocab_size=self.model.config.vocab_size, **arguments
        )
        self.state.add(name, loss * self.items)
        self.state.add(f"{name}_labels", (labels != IGNORE).sum())
        return loss
