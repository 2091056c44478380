"""How an indexer learns (DeepSeek-V3.2 report, section 2.1): from what attention attended to, whether or not it was asked.

L = Σ_t w_t · KL(p_t ‖ softmax(I_t)): p_t is attention's distribution summed over the heads and divided by its sum, I_t are the
indexer's scores; both over all keys that query t sees (dense warm-up), or over those that were chosen for it (sparse stage).

The indexer's inputs are detached, and attention does not learn from it. So the gradient of a layer's indexer is known as soon as
the layer has run: it is computed there, by blocks of queries, and waits for the backward pass as the gradient of the indexer's
weights. Nothing of queries times keys outlives its block.
"""

import torch
from torch import nn

from modeling_deepseek_moe.ops._operands import kept_weight_of

DENSE, SPARSE = "dense", "sparse"  # the stages
WORKSPACE = 1 << 24  # scores of single heads (B·H·q·kv), or numbers of gathered latents, at a time


class IndexerLosses:
    """Of one forward pass: the sum over layers and its gradient, until the model's loss takes both.

    Args:
        stage: ``"dense"``: the indexers alone are trained, and their loss is the model's. ``"sparse"``: it is added.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self.value: torch.Tensor | None = None
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}

    def add(
        self,
        attention: nn.Module,
        weights: torch.Tensor,
        inputs: tuple,
        queries: tuple[torch.Tensor, torch.Tensor],
        latents: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        indices: torch.Tensor | None,
    ) -> None:
        """One layer's, which has an indexer.

        Args:
            weights: ``[B, S]``, w of each query.
            inputs: of the indexer: hidden states, the latent of the queries, rotary tables.
            queries, latents: of attention, as `DeepseekAttention.attend` takes them, all of this pass.
            mask: as it masked attention.
            indices: what was chosen, ``[B, S, k]``; ``None`` where every key was attended to.
        """
        parameters = [parameter for parameter in attention.indexer.parameters() if parameter.requires_grad]
        if not parameters:
            return
        # not those of gradient checkpointing, which would run the layer again for what is needed now
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            with torch.enable_grad():
                scored = _scored(attention.indexer, *inputs)
            blocks = _DenseBlocks if indices is None else _ChosenBlocks
            over = mask if indices is None else indices
            made = blocks(attention, queries, latents, over)
            with torch.autocast(weights.device.type, enabled=False):  # scores are summed in fp32
                value, gradients = _by_blocks(made, scored, weights)
            # an adapter may have some of the three alone
            learned = [pair for pair in zip(scored, gradients, strict=True) if pair[0].requires_grad]
            outputs, given = zip(*learned, strict=True)
            found = torch.autograd.grad(outputs, parameters, given)
        self.value = value if self.value is None else self.value + value
        self.gradients |= zip(parameters, found, strict=True)

    def close(self, loss: torch.Tensor) -> torch.Tensor:
        """The model's loss with that of the indexers, whose weights get the gradients that wait times its own."""
        if self.value is None:
            return loss
        value = self.value.to(loss.dtype)
        total = value if self.stage == DENSE else loss + value
        return _WithGradients.apply(total, list(self.gradients.values()), *self.gradients)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _scored(indexer: nn.Module, hidden_states, q_latent, position_embeddings) -> tuple[torch.Tensor, ...]:
    """The indexer's queries ``[B, S, h, d]``, weights ``[B, S, h]`` and keys ``[B, S, d]``, of inputs without gradient."""
    hidden_states, q_latent = hidden_states.detach(), q_latent.detach()
    queries = indexer.queries(q_latent, position_embeddings)
    return queries, indexer.weights(hidden_states), indexer.keys(hidden_states, position_embeddings)


def _by_blocks(blocks, scored: tuple[torch.Tensor, ...], weights: torch.Tensor):
    """The loss, and its gradients to queries, weights and keys of the indexer."""
    queries, head_weights, keys = (tensor.detach() for tensor in scored)
    wide = torch.promote_types(queries.dtype, torch.float32)
    gradients = tuple(torch.zeros_like(tensor, dtype=wide) for tensor in (queries, head_weights, keys))
    total = torch.zeros((), dtype=wide, device=queries.device)
    step = blocks.height(queries)
    for start in range(0, queries.shape[1], step):
        rows = slice(start, min(start + step, queries.shape[1]))
        with torch.no_grad():
            target, visible = blocks.target(rows)
        leaves = [tensor.to(wide).requires_grad_() for tensor in (queries[:, rows], head_weights[:, rows], keys)]
        with torch.enable_grad():
            scores = blocks.scores(rows, *leaves)
            loss = (divergence(target, scores, visible) * weights[:, rows]).sum()
        for whole, part, place in zip(
            gradients, torch.autograd.grad(loss, leaves), (rows, rows, slice(None)), strict=True
        ):
            whole[:, place] += part
        total += loss.detach()
    return total, tuple(found.to(tensor.dtype) for found, tensor in zip(gradients, scored, strict=True))


def divergence(target: torch.Tensor, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ softmax(scores)) over the last dimension, of what is ``visible``."""
    log_share = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    return (torch.xlogy(target, target) - target * log_share).sum(dim=-1)


class _DenseBlocks:
    """Every key: expanded, as attention to all of them is in training."""

    def __init__(self, attention: nn.Module, queries, latents, mask: torch.Tensor | None):
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 4):
            raise ValueError(
                f"the indexers' loss: found attn_implementation={attention.config._attn_implementation!r}, whose mask does not "
                "say which keys a query sees, wanted 'sdpa' or 'eager'"
            )
        self.mask, self.scaling = mask, attention.scaling
        with torch.no_grad():
            self.query = torch.cat(queries, dim=-1)
            self.key = attention.expanded_keys(*latents).to(self.query.dtype)

    def height(self, queries: torch.Tensor) -> int:
        batch, heads, length, _ = self.query.shape
        return max(1, WORKSPACE // (batch * max(heads, queries.shape[2]) * length))

    def target(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, q, kv]`` of the keys that the last of the rows sees, and which the others see."""
        visible = self._visible(rows)
        scores = _wide(self.query[:, :, rows] @ self.key[:, :, : rows.stop].transpose(2, 3)) * self.scaling
        hidden = torch.finfo(scores.dtype).min
        return scores.masked_fill(~visible.unsqueeze(1), hidden).softmax(dim=-1).mean(dim=1), visible

    def scores(self, rows: slice, queries, weights, keys) -> torch.Tensor:
        products = torch.einsum("bshd,btd->bsht", queries, keys[:, : rows.stop])
        return (weights.unsqueeze(2) @ products.relu()).squeeze(2)

    def _visible(self, rows: slice) -> torch.Tensor:
        """``[B or 1, q, kv]``."""
        index = torch.arange(rows.stop, device=self.query.device)
        causal = (index <= index[rows].unsqueeze(1)).unsqueeze(0)
        if self.mask is None:
            return causal
        part = self.mask[:, 0, rows if self.mask.shape[2] > 1 else slice(None), : rows.stop]
        return causal & (part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2)


class _ChosenBlocks:
    """The keys that were chosen for each query: absorbed, as attention to them is."""

    def __init__(self, attention: nn.Module, queries, latents, indices: torch.Tensor):
        self.indices, self.scaling = indices, attention.scaling
        with torch.no_grad():
            (q_nope, q_pe), weight = queries, kept_weight_of(attention.kv_b_proj, queries[0])
            w_uk = weight.view(q_nope.shape[1], -1, weight.shape[-1])[:, : q_nope.shape[-1]]
            q_latent = torch.einsum("bhsn,hnr->bshr", q_nope, w_uk)
            self.query = torch.cat((q_latent, q_pe.transpose(1, 2)), dim=-1)  # [B, S, H, r + p]
            self.latents = torch.cat(latents, dim=-1).squeeze(1).to(self.query.dtype)

    def height(self, queries: torch.Tensor) -> int:
        batch, _, heads, width = self.query.shape
        widest = max(heads, width, *queries.shape[2:])
        return max(1, WORKSPACE // (batch * self.indices.shape[2] * widest))

    def target(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, q, k]`` of the chosen keys, and which of them there are."""
        visible = self.indices[:, rows] >= 0
        scores = _wide(self.query[:, rows] @ self._gathered(self.latents, rows).transpose(2, 3)) * self.scaling
        hidden = torch.finfo(scores.dtype).min
        return scores.masked_fill(~visible.unsqueeze(2), hidden).softmax(dim=-1).mean(dim=2), visible

    def scores(self, rows: slice, queries, weights, keys) -> torch.Tensor:
        products = queries @ self._gathered(keys, rows).transpose(2, 3)
        return (weights.unsqueeze(2) @ products.relu()).squeeze(2)

    def _gathered(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """``[B, q, k, ·]`` of ``[B, kv, ·]``; the first stands in for none."""
        index = self.indices[:, rows].clamp(min=0).long()
        flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
        return tensor.gather(1, flat).unflatten(1, index.shape[1:])


def _wide(scores: torch.Tensor) -> torch.Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class _WithGradients(torch.autograd.Function):
    """Of the model's loss a copy; parameters get gradients that are known, times the loss's own."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()  # which Trainer scales in place

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None, *(gradient * upstream.to(gradient.dtype) for gradient in ctx.gradients)
