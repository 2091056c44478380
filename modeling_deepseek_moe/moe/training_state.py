"""Statistics of routers in training, one object per model and one per forward pass, and how a balance loss joins the graph.

A layer that gradient checkpointing runs twice is counted once. Balance losses are not carried through the layers: each is
tied to the router weights of its own layer, and gets, in the backward pass, the gradient that the model's loss got. So
accumulation, world size and loss scaling apply to it as to the language model's loss.

Legend: T tokens, E experts, K experts per token, S sequences.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from modeling_deepseek_moe.indexer_loss import IndexerLosses
from modeling_deepseek_moe.moe.balance import balance_loss, expert_load
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter


@dataclass
class TrainingState:
    """What a model in training does besides predicting the next token, and what came of it since it was last read.

    Set as ``DeepseekMoeModel.training_state``; without one nothing is counted. Only passes in training mode count.

    Args:
        balance_alpha: α of the balance loss; 0 for none.
        balance_by_sequence: each sequence by itself (V3; V2's ``seq_aux``), or all tokens of a batch together.
        mtp_weight: λ of the multi-token prediction loss; 0 for none.
        indexer_stage: how indexers are trained, ``"dense"`` or ``"sparse"``; ``None``: not.
    """

    balance_alpha: float = 0.0
    balance_by_sequence: bool = True
    mtp_weight: float = 0.0
    indexer_stage: str | None = None
    loads: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [E] int64
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int | None = None  # the optimizer step that `step_loads` are of, over all ranks
    step_loads: dict[int, torch.Tensor] = field(default_factory=dict)

    def add_load(self, layer: int, load: torch.Tensor) -> None:
        self.loads[layer] = self.loads[layer] + load if layer in self.loads else load

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a figure, without gradient, to ``sums[name]``."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take_loads(self) -> dict[int, torch.Tensor]:
        """The loads since the last call."""
        loads, self.loads = self.loads, {}
        return loads

    def take_sums(self) -> dict[str, torch.Tensor]:
        """The sums since the last call."""
        sums, self.sums = self.sums, {}
        return sums


def sequence_ids(
    shape: Sequence[int],
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Which sequence each token belongs to, ``[B, S_len]`` counted from 0, and how many ids there are at most.

    Packed sequences begin where ``position_ids`` do not count on by one. Padding (a 2-d mask's zeros) gets the last id
    plus one.
    """
    batch, length = shape
    starts = torch.zeros(batch, length, dtype=torch.long, device=device)
    starts[:, 0] = 1
    count = batch
    if position_ids is not None and length > 1:
        positions = position_ids.expand(batch, -1)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        count = batch * length  # as many as there could be: their number would wait for the device
        if device.type == "cpu":
            count = int(starts.sum())
    ids = starts.flatten().cumsum(0).view(batch, length) - 1
    if attention_mask is not None and attention_mask.ndim == 2:
        ids = ids.masked_fill(attention_mask[:, -length:] == 0, count)
    return ids, count


class TrainingPass:
    """One forward pass in training.

    Args:
        sequences: ``[B, S_len]`` and their number, as from `sequence_ids`.
        wanted: ``[B, S_len]``, which tokens have a label. ``None``: there is no loss.
        items: how many labels the mean that is the language model's loss is over. A sequence's balance loss, and its indexers'
            loss, which is a mean over all its tokens, weigh as its labels do in that mean.
    """

    def __init__(
        self,
        state: TrainingState,
        sequences: tuple[torch.Tensor, int],
        wanted: torch.Tensor | None = None,
        items: torch.Tensor | None = None,
    ):
        self.state = state
        self.sequence_T, self.num_sequences = sequences[0].flatten(), sequences[1]
        self.token_mask = self.sequence_T < self.num_sequences
        self.balance_loss: torch.Tensor | None = None  # of all layers, weighed, with α: a value without gradient
        self.upstream: torch.Tensor | None = None  # the gradient of the model's loss, once that is known
        self.root = self
        self.items = items
        self.indexers: IndexerLosses | None = None
        self.sequence_weights = None
        if wanted is None:
            return
        if state.indexer_stage:
            self.indexers = IndexerLosses(state.indexer_stage)
            labels_T = wanted.flatten().long()
            self.num_labels = labels_T.sum()
            # of each token's sequence
            self.labels_T, self.tokens_T = (
                self._by_sequence(counts_T)[self.sequence_T] for counts_T in (labels_T, torch.ones_like(labels_T))
            )
        if state.balance_alpha:
            if not state.balance_by_sequence:
                self.num_sequences = 1
                self.sequence_T = (~self.token_mask).long()
            weights = self._by_sequence(wanted.flatten().float() / items)
            self.sequence_weights = state.balance_alpha * weights[: self.num_sequences]

    def _by_sequence(self, values_T: torch.Tensor) -> torch.Tensor:
        return values_T.new_zeros(self.num_sequences + 1).index_add(0, self.sequence_T, values_T)

    def masked(self, token_mask: torch.Tensor) -> "TrainingPass":
        """A part of this pass, for layers to which only the tokens of ``token_mask [B, S_len]`` matter."""
        part = copy.copy(self)
        part.token_mask = token_mask.flatten()
        part.sequence_T = self.sequence_T.masked_fill(~part.token_mask, self.num_sequences)
        return part

    def observe(
        self,
        layer: int,
        router: DeepseekTopkRouter,
        logits_TE: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Count a router's choice; ``topk_weights``, with the layer's balance loss tied to them."""
        # in the backward pass it is a checkpointed layer that runs again
        is_first = torch._C._current_graph_task_id() == -1
        if is_first:
            self.state.add_load(layer, expert_load(topk_indices, router.num_experts, self.token_mask))
        if self.sequence_weights is None:
            return topk_weights
        scores_TE = router.scores(logits_TE)
        if router.topk_method == "noaux_tc":  # the loss is of what the scores choose without bias and groups (eq. 18)
            topk_indices = scores_TE.detach().topk(router.top_k, dim=-1, sorted=False).indices
        losses_S = balance_loss(scores_TE, topk_indices, self.sequence_T, self.num_sequences)
        loss = (losses_S * self.sequence_weights).sum()
        if is_first:
            value, root = loss.detach(), self.root
            root.balance_loss = value if root.balance_loss is None else root.balance_loss + value
        return _InjectAuxLoss.apply(topk_weights, loss, self.root) if loss.requires_grad else topk_weights

    def observe_attention(self, attention: nn.Module, *seen) -> None:
        """Have the indexer of a layer learn from what attended; ``seen``: as `IndexerLosses.add` takes it, after the weights."""
        is_first = torch._C._current_graph_task_id() == -1
        if self.indexers is not None and is_first:
            hidden_states = seen[0][0]
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            weights_T = self.token_mask * self.labels_T.to(wide) / self.tokens_T / self.items
            self.indexers.add(attention, weights_T.view(hidden_states.shape[:2]), *seen)

    def close(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss``, whose gradient the balance losses of this pass will share, with the indexers' loss."""
        if self.sequence_weights is not None and loss.requires_grad:
            loss = _RecordUpstreamGrad.apply(loss, self)
        if self.indexers is None or self.indexers.value is None:
            return loss
        self.state.add("indexer_loss", self.indexers.value * self.items)
        self.state.add("indexer_loss_labels", self.num_labels)
        return self.indexers.close(loss)


class _RecordUpstreamGrad(torch.autograd.Function):
    """Identity at the model's loss: its gradient is noted for `_InjectAuxLoss`, which the backward pass reaches later."""

    @staticmethod
    def forward(ctx, loss, training_pass):
        ctx.training_pass = training_pass
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, gradient):
        ctx.training_pass.upstream = gradient
        return gradient, None


class _InjectAuxLoss(torch.autograd.Function):
    """Identity on a tensor on the way to the model's loss; ``loss`` gets the gradient that the model's loss got."""

    @staticmethod
    def forward(ctx, tensor, loss, training_pass):
        ctx.training_pass = training_pass
        ctx.like = loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        upstream = ctx.training_pass.upstream
        return gradient, None if upstream is None else upstream.to(ctx.like), None
