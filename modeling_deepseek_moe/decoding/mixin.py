"""``generate(use_mtp=True)``: the door to `decoding` in transformers' own `generate`."""

import copy
import inspect
from functools import partial

from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from modeling_deepseek_moe.compat import CACHE_NAME, ModelMixin
from modeling_deepseek_moe.decoding.loop import MtpStats, decode

AUTO = "auto"
# what the loop does not do, with what each would have to be
REFUSED = {
    "num_beams": (None, 1),
    "prompt_lookup_num_tokens": (None, 0),
    "guidance_scale": (None, 1, 1.0),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
}


class MtpGenerationMixin(ModelMixin):
    """`generate` with drafts of the model's MTP layers. Mixed into the language models before `GenerationMixin`.

    ``mtp_stats`` is what the last call with ``use_mtp`` came to.
    """

    mtp_stats: MtpStats | None = None

    def generate(self, *args, use_mtp: bool | int | str | None = None, **kwargs):
        """transformers' `generate`, and with ``use_mtp`` several tokens for each pass of the model.

        Args:
            use_mtp: ``True``: draft as many tokens as there are MTP layers; a number: that many; ``"auto"``: as ``True``, for
                as long as measuring shows that it is faster. The text is the model's own: greedily token by token, and in
                distribution where tokens are sampled.

        Raises:
            ValueError: the model has no MTP layers, or ``use_mtp`` meets a setting that it does not go with.
        """
        kwargs |= dict(zip(list(inspect.signature(super().generate).parameters), args, strict=False))
        config = kwargs.get("generation_config") or self.generation_config
        wanted = getattr(config, "use_mtp", None) if use_mtp is None else use_mtp
        if not wanted:
            _switch_off(config, kwargs)
            return super().generate(**kwargs)
        drafts = self._drafts(wanted)
        for name, allowed in REFUSED.items():
            value = kwargs.get(name, getattr(config, name, None))
            if value not in allowed:
                raise ValueError(f"use_mtp={wanted!r}: {name}={value!r} does not go with it, leave out one of them")
        for name in ("assistant_model", "custom_generate", "inputs_embeds", "synced_gpus"):
            if kwargs.get(name) is not None:
                raise ValueError(f"use_mtp={wanted!r}: {name} does not go with it, leave out one of them")
        streamer = kwargs.get("streamer")
        method = partial(_decode, drafts=drafts, is_automatic=wanted == AUTO, streamer=streamer)
        _add_stop_strings(config, kwargs)
        _switch_off(config, kwargs)
        return super().generate(**kwargs, custom_generate=method)

    def _drafts(self, wanted: bool | int | str) -> int:
        depth = len(self.base_model.mtp_layers)
        if wanted is not True and wanted != AUTO and not (type(wanted) is int and wanted > 0):
            raise ValueError(f"use_mtp={wanted!r} is not one of True, {AUTO!r}, a number of tokens to draft")
        if not depth:
            raise ValueError(
                f"use_mtp={wanted!r}: found a model without MTP layers (num_nextn_predict_layers="
                f"{self.config.num_nextn_predict_layers}), wanted at least one; `deepseek-moe convert mtp --action graft` adds a "
                "release's own"
            )
        return wanted if type(wanted) is int else depth


def _decode(model, input_ids, generation_config=None, drafts=1, is_automatic=False, **kwargs):
    """What `generate` calls once it has prepared everything; it hands its ``streamer`` to no method but its own."""
    kwargs.pop("synced_gpus", None)
    sequences, stats, cache = decode(
        model,
        input_ids,
        drafts=drafts,
        is_automatic=is_automatic,
        generation_config=generation_config,
        **kwargs,
    )
    model.mtp_stats = stats
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})
    return sequences


def _switch_off(config: GenerationConfig, kwargs: dict) -> None:
    """transformers' own drafts, which a config may ask for; it warns of an argument next to a config."""
    if not getattr(config, "use_mtp", None):
        return
    if kwargs.get("generation_config") is None:
        kwargs["use_mtp"] = False
    else:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].use_mtp = False


def _add_stop_strings(config: GenerationConfig, kwargs: dict) -> None:
    """Stop strings as a criterion: `generate` makes one, and loses the tokenizer for it where a method is not its own."""
    wanted = kwargs.pop("stop_strings", None) or config.stop_strings
    if wanted is None:
        return
    if kwargs.get("tokenizer") is None:
        raise ValueError(f"stop_strings={wanted!r} want the tokenizer: generate(..., tokenizer=tokenizer)")
    given = kwargs.get("stopping_criteria") or ()
    criterion = StopStringCriteria(stop_strings=wanted, tokenizer=kwargs["tokenizer"])
    kwargs["stopping_criteria"] = StoppingCriteriaList([*given, criterion])
    if config.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
