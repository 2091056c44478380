"""What every layer of one forward pass shares: rotary tables, mask, the form of attention, and what indexers choose."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from modeling_deepseek_moe.attention import ABSORBED, EXPANDED, choose_mla_path
from modeling_deepseek_moe.indexer_loss import DENSE
from modeling_deepseek_moe.masks import build_mask
from modeling_deepseek_moe.sparse_attention import ChosenKeys

logger = logging.get_logger(__name__)


def layer_context(
    model: nn.Module,
    inputs_embeds: torch.Tensor,
    attention_mask,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    past_length: int | None,
    mla_path: str | None,
    **kwargs,
) -> dict[str, Any]:
    """The arguments of the layers of a `DeepseekMoeModel`, besides hidden states and cache.

    Args:
        inputs_embeds: ``[B, q, hidden_size]``.
        past_length: what `prepare_cache` returned.
        mla_path: what the caller wants; ``None``: the form that costs less.

    Raises:
        ValueError: an unknown ``mla_path``, or a wish that sparse attention does not go with.
    """
    config, length = model.config, inputs_embeds.shape[1]
    maybe_packed = position_ids is not None
    if position_ids is None:
        start = past_length if past_length is not None else cache.get_seq_length()
        position_ids = (torch.arange(length, device=inputs_embeds.device) + start).unsqueeze(0)
    kv_length = cache.get_max_length() if past_length is None else past_length + length
    if mla_path not in (None, ABSORBED, EXPANDED):
        raise ValueError(f"mla_path={mla_path!r} is not one of {ABSORBED!r}, {EXPANDED!r}, None")
    outputs_attentions = bool(kwargs.pop("output_attentions", config.output_attentions))
    is_sparse = config.has_indexers and not _indexers_warm_up(model) and kv_length > config.index_topk
    if is_sparse:
        _check_sparse(model, kv_length, mla_path, outputs_attentions)
    path = ABSORBED if is_sparse else mla_path or choose_mla_path(config, length, kv_length)
    if not getattr(config, "is_causal", True):
        path, past_length = EXPANDED, (past_length or None)  # the latent forms mask causally
    mask = build_mask(
        config,
        inputs_embeds,
        attention_mask,
        cache,
        past_length,
        position_ids,
        maybe_packed=maybe_packed,
        dense=path == ABSORBED or bool(past_length),
        by_key=is_sparse,
    )
    return {
        "position_embeddings": model.rotary_emb(inputs_embeds, position_ids),
        "position_ids": position_ids,
        "attention_mask": mask,
        "mla_path": path,
        "past_length": past_length,
        "output_attentions": outputs_attentions,
        **({"chosen": ChosenKeys(keeps_all=model.training)} if is_sparse else {}),
        **kwargs,
    }


def _indexers_warm_up(model: nn.Module) -> bool:
    """Whether indexers learn from attention to every key; says once where they do not learn at all."""
    if not model.training:
        return False
    state = model.training_state
    stage = None if state is None else state.indexer_stage
    learns = torch.is_grad_enabled() and any(
        parameter.requires_grad for parameter in model.layers[0].self_attn.indexer.parameters()
    )
    if stage is None and learns:
        logger.warning_once(
            "self_attn.indexer.*: indexers have no gradient from the next token's loss and stay as they are; to train them: "
            "Trainer(..., callbacks=[IndexerLossCallback()])"
        )
    return stage == DENSE


def check_labels(model: nn.Module) -> None:
    """Before a causal language model's loss is computed.

    Raises:
        ValueError: it is a stage of a pipeline; or nothing but indexers is to be trained (an adapter of theirs), and that loss has no
            gradient for them.
    """
    if model.model.has_gaps:
        raise ValueError(
            "labels: found a stage of a pipeline (pp_size), which gives no loss, wanted tp_size or fsdp_size"
        )
    state = model.model.training_state
    if (
        not model.training
        or not model.config.has_indexers
        or not torch.is_grad_enabled()
        or (state is not None and state.indexer_stage)
    ):
        return
    learned = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    first = next(learned, None)
    if first is not None and ".indexer." in first and all(".indexer." in name for name in learned):
        raise ValueError(
            f"{first}: found nothing but indexers to train, which have no gradient from the next token's loss, wanted their own: "
            "Trainer(..., callbacks=[IndexerLossCallback()]); or other layers in the adapter"
        )


def _check_sparse(model: nn.Module, kv_length: int, mla_path: str | None, outputs_attentions: bool) -> None:
    """
    Raises:
        ValueError: something was asked for that attention to a choice of keys does not have.
    """
    config = model.config
    dropout = config.attention_dropout if model.training else 0
    wishes = {
        "output_attentions": outputs_attentions,
        "mla_path": mla_path if mla_path == EXPANDED else None,
        "is_causal": "False" if not getattr(config, "is_causal", True) else None,
        "attention_dropout": dropout,
    }
    for name, wish in wishes.items():
        if wish:
            raise ValueError(
                f"{name}={wish}: found {kv_length} keys, wanted at most index_topk={config.index_topk}: beyond, attention is "
                f"sparse, absorbed and causal. Leave out {name}, or pass fewer tokens"
            )
