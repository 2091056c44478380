"""``generate(use_mtp=True)``, and transformers' own ways of drafting for several rows: the door to `decoding` in `generate`."""

import inspect
from functools import partial

from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.utils import logging

from modeling_deepseek_moe.compat import CACHE_NAME, ModelMixin
from modeling_deepseek_moe.decoding.choose import Choice
from modeling_deepseek_moe.decoding.loop import DraftStats, decode
from modeling_deepseek_moe.decoding.sources import ASKED_BY, Source, of_a_batch, of_mtp_layers, refuse_ranks

logger = logging.get_logger(__name__)

# what the loop does not do, with what each would have to be
REFUSED = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
    "synced_gpus": (None, False),
    "force_words_ids": (None,),
    "constraints": (None,),
    "dola_layers": (None,),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "speculation_type": (None,),
    "cache_implementation": (None, *ALL_CACHE_IMPLEMENTATIONS),
}
# each would have to be left out
REFUSED_ARGUMENTS = ("custom_generate", "inputs_embeds")


class DraftingMixin(ModelMixin):
    """`generate` with drafts. Mixed into the language models before `GenerationMixin`.

    ``draft_stats`` is what the last call that drafted here came to.
    """

    draft_stats: DraftStats | None = None

    def generate(self, *args, use_mtp: bool | int | str | None = None, **kwargs):
        """transformers' `generate`, and with drafts several tokens for each pass of the model.

        ``prompt_lookup_num_tokens`` and ``assistant_model`` are as in transformers for one row; for several, which it
        refuses, the rows accept drafts each at their own pace. The text is the model's own: greedily token by token, and in
        distribution where tokens are sampled.

        Args:
            use_mtp: ``True``: draft as many tokens as there are MTP layers; a number: that many; ``"auto"``: as ``True``, where
                measuring shows that it is faster, and not at all where it cannot be (``draft_stats.reason``).

        Raises:
            ValueError: the model has no MTP layers, or drafts meet a setting that they do not go with.
        """
        kwargs |= dict(zip(list(inspect.signature(super().generate).parameters), args, strict=False))
        config = _merged(self, kwargs)
        wanted = getattr(config, "use_mtp", None) if use_mtp is None else use_mtp
        source = of_mtp_layers(self, wanted, config, kwargs) if wanted else of_a_batch(self, config, kwargs)
        if source is None:
            return super().generate(**kwargs, **_left_out(config, "use_mtp"))
        refuse_ranks(self, source)
        _refuse(source, config, kwargs, ASKED_BY if wanted else ())
        expected = source.expect() if source.expect is not None else None
        # elsewhere a step of a small model takes what it takes to start its kernels, whatever they read
        hopeless = expected.hopeless() if expected is not None and self.device.type == "cpu" else None
        if hopeless is not None:
            logger.info_once(f"{source.said}: decodes without drafts: {hopeless}")
            self.draft_stats = DraftStats(reason=hopeless)
            return super().generate(**kwargs, **_left_out(config, "use_mtp"))
        method = partial(_decode, source=source, expected=expected, streamer=kwargs.get("streamer"))
        _add_stop_strings(config, kwargs)
        kwargs.pop("assistant_model", None)
        seen_to = _left_out(config, "use_mtp", "stop_strings", "prompt_lookup_num_tokens")
        return super().generate(**kwargs, **seen_to, custom_generate=method)

    def _prepare_generation_config(self, generation_config, left_out: tuple[str, ...] = (), **kwargs):
        """As `generate` merges arguments, a config that is passed and the model's own, without the settings ``left_out``.

        These are ``None`` whoever gives them. In a config that is passed ``None`` asks for the model's own, and an argument
        next to it is warned of.
        """
        config, others = super()._prepare_generation_config(generation_config, **kwargs)
        for name in left_out:
            setattr(config, name, None)
        return config, others


def _refuse(source: Source, config: GenerationConfig, kwargs: dict, others: tuple[str, ...]) -> None:
    """
    Args:
        others: ways of drafting that were not taken.
    """
    allowed_of = REFUSED | {name: (None, 0) for name in others if hasattr(config, name)}
    if config.get_generation_mode() == GenerationMode.CONTRASTIVE_SEARCH:  # else it is not looked at
        allowed_of["penalty_alpha"] = (None,)
    for name, allowed in allowed_of.items():
        value = kwargs.get(name, getattr(config, name, None))
        if value not in allowed:
            raise ValueError(f"{source.said}: {name}={value!r} does not go with it, leave out one of them")
    for name in (*REFUSED_ARGUMENTS, *others):
        if kwargs.get(name) is not None:
            raise ValueError(f"{source.said}: {name} does not go with it, leave out one of them")


def _decode(model, input_ids, source, expected=None, generation_config=None, **kwargs):
    """What `generate` calls once it has prepared everything; it hands its ``streamer`` to no method but its own."""
    sequences, stats, cache = decode(
        model,
        input_ids,
        choice=Choice(source.drafts, expected),
        make_draft=source.make,
        generation_config=generation_config,
        **kwargs,
    )
    model.draft_stats = stats
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})
    return sequences


def _merged(model, kwargs: dict) -> GenerationConfig:
    """What `generate` will go by: arguments, then a config that is passed, then the model's own."""
    given = {name: value for name, value in kwargs.items() if name != "generation_config"}
    return model._prepare_generation_config(kwargs.get("generation_config"), **given)[0]


def _left_out(config: GenerationConfig, *names: str) -> dict:
    """For `generate`: of the settings that are seen to here, those that ``config``, as merged, has."""
    found = tuple(name for name in names if getattr(config, name, None) is not None)
    return {"left_out": found} if found else {}  # a function of the Hub is handed every argument there is


def _add_stop_strings(config: GenerationConfig, kwargs: dict) -> None:
    """Stop strings as a criterion: `generate` makes one, and loses the tokenizer for it where a method is not its own."""
    wanted = config.stop_strings
    if wanted is None:
        return
    if kwargs.get("tokenizer") is None:
        raise ValueError(f"stop_strings={wanted!r} want the tokenizer: generate(..., tokenizer=tokenizer)")
    given = kwargs.get("stopping_criteria") or ()
    criterion = StopStringCriteria(stop_strings=wanted, tokenizer=kwargs["tokenizer"])
    kwargs["stopping_criteria"] = StoppingCriteriaList([*given, criterion])
