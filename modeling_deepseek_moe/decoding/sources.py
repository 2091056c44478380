"""Where drafts come from: the model's MTP layers, the text itself, or an assistant; what a call of ``generate`` asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_deepseek_moe.decoding.assistant import AssistantDraft
from modeling_deepseek_moe.decoding.draft import MtpDraft
from modeling_deepseek_moe.decoding.expected import Expected, expect
from modeling_deepseek_moe.decoding.lookup import LookupDraft
from modeling_deepseek_moe.decoding.loop import Draft
from modeling_deepseek_moe.decoding.rows import Rows

AUTO = "auto"
WINDOW = 32  # tokens of the prompt that MTP layers read where it is not known yet whether they pay
# transformers' own, where neither the call nor a config says anything else
NGRAM, ASSISTANT_TOKENS, CONFIDENCE = 2, 20, 0.4
ASKED_BY = ("prompt_lookup_num_tokens", "assistant_model")


@dataclass(frozen=True)
class Source:
    """
    Args:
        said: how the caller asked for it.
        drafts: tokens to draft in a step, at most.
        make: see `loop.decode`.
        expect: reckons the steps, where they draft automatically.
        reads_hidden_states: the model's, as its MTP layers do.
    """

    said: str
    drafts: int
    make: Callable[[Rows, torch.Tensor | None, int], Draft]
    expect: Callable[[], Expected] | None = None
    reads_hidden_states: bool = False


def of_mtp_layers(
    model: nn.Module, wanted: bool | int | str, config: GenerationConfig, kwargs: dict[str, Any]
) -> Source:
    """
    Args:
        config: as `generate` merges it.

    Raises:
        ValueError: the model has no MTP layers, or ``wanted`` is no way of asking for them.
    """
    depth, said = len(model.base_model.mtp_layers), f"use_mtp={wanted!r}"
    if wanted is not True and wanted != AUTO and not (type(wanted) is int and wanted > 0):
        raise ValueError(f"{said} is not one of True, {AUTO!r}, a number of tokens to draft")
    if not depth:
        raise ValueError(
            f"{said}: found a model without MTP layers (num_nextn_predict_layers={model.config.num_nextn_predict_layers}), "
            "wanted at least one; `deepseek-moe convert mtp --action graft` adds a release's own"
        )
    drafts = wanted if type(wanted) is int else depth
    window = WINDOW if wanted == AUTO else None
    reckon = partial(expect, model, max(1, _rows(config, kwargs)), drafts, WINDOW) if wanted == AUTO else None

    def make(rows: Rows, padding: torch.Tensor | None, past: int) -> Draft:
        return MtpDraft(model, drafts, None if padding is None else padding[:, past:], window)

    return Source(said, drafts, make, reckon, reads_hidden_states=True)


def refuse_ranks(model: nn.Module, source: Source) -> None:
    """
    Raises:
        ValueError: several ranks have the model, and would not draft alike.
    """
    said = f"{source.said}: found a model over several ranks"
    if model.base_model.has_gaps:
        reason = (
            "has its MTP layers in the last stage only" if source.reads_hidden_states else "does not verify drafts"
        )
        raise ValueError(f"{said}, whose pipeline {reason}, wanted one without pp_size")
    if getattr(model, "_is_fsdp_managed_module", False):
        raise ValueError(f"{said}, each with a batch of its own (fsdp_size), wanted one batch for all: tp_size")
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if ranks > 1 and is_deepspeed_zero3_enabled():
        raise ValueError(f"{said}, each with a batch of its own (ZeRO-3), wanted a model that is whole, or tp_size")
    if source.expect is not None and (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(f"{said}, which would measure different times, wanted use_mtp=True, or a number")


def of_a_batch(model: nn.Module, config: GenerationConfig, kwargs: dict[str, Any]) -> Source | None:
    """What transformers does for one row alone, for several: prompt lookup and assistants; ``None`` where it is not asked for.

    Args:
        config: as `generate` merges it.

    Raises:
        ValueError: an assistant with another vocabulary.
    """
    count, assistant = config.prompt_lookup_num_tokens, kwargs.get("assistant_model")
    if not (count or assistant) or _rows(config, kwargs) < 2:
        return None
    if count:
        if type(count) is not int or count < 1:
            raise ValueError(f"prompt_lookup_num_tokens={count!r} is no number of tokens to look up")
        ngram = config.max_matching_ngram_size or NGRAM
        return Source(f"prompt_lookup_num_tokens={count}", count, partial(_lookup, count, ngram))
    found, wanted = assistant.config.get_text_config().vocab_size, model.config.vocab_size
    if found != wanted or kwargs.get("assistant_tokenizer") is not None:
        raise ValueError(
            f"assistant_model: found a vocabulary of {found} tokens, wanted the model's own {wanted} and its tokenizer where there "
            "are several rows; transformers translates between two tokenizers for one row at a time"
        )
    # what merging fills in would hide what the assistant's config says
    said = (kwargs.get("generation_config"), assistant.generation_config, model.generation_config)
    drafts = _setting("num_assistant_tokens", ASSISTANT_TOKENS, kwargs, *said)
    confidence = _setting("assistant_confidence_threshold", CONFIDENCE, kwargs, *said)
    return Source("assistant_model", drafts, partial(_assistant, assistant, drafts, confidence))


def _lookup(count: int, ngram: int, rows: Rows, padding: torch.Tensor | None, past: int) -> Draft:
    return LookupDraft(rows, count, ngram, padding)


def _assistant(model, count: int, confidence: float, rows: Rows, padding: torch.Tensor | None, past: int) -> Draft:
    prompt = rows.tokens[:, : rows.lengths[0]]
    return AssistantDraft(model, count, confidence, prompt, padding)


def _rows(config: GenerationConfig, kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids", kwargs.get("inputs"))
    return 0 if ids is None else len(ids) * (config.num_return_sequences or 1)


def _setting(name: str, otherwise, kwargs: dict[str, Any], *configs: GenerationConfig | None):
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), otherwise)
