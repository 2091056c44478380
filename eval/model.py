"""lm-eval's HFLM for this package: stop strings by row, explicit sampling, batches by memory, answers kept as they come."""

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache

import modeling_deepseek_moe  # noqa: F401  registers the family
from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.chat_template import THINK, THINK_END, end_mark
from modeling_deepseek_moe.checkpoint.journal import Journal
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.eval.sampling import RowSampler
from modeling_deepseek_moe.machine import memory
from modeling_deepseek_moe.templates import released_template
from modeling_deepseek_moe.tokens import released_choice

MEMORY_SHARE = 0.5  # of the free memory, for caches and activations
MOST_ROWS = 64


def request_key(kind: str, arguments: object, repeat: int) -> str:
    """Names the ``repeat``-th request with these arguments, in any process."""
    text = json.dumps([kind, arguments, repeat], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Settings:
    """Of one generation request. ``until``: strings that end the text, and are no part of it."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_p: float

    @classmethod
    def read(cls, given: dict) -> "Settings":
        """
        Raises:
            ValueError: a setting that is not known here, or out of range: nothing is silently left to the model's defaults.
        """
        given = dict(given)
        until, limit = given.pop("until", []), given.pop("max_gen_toks", 256)
        temperature, top_p = float(given.pop("temperature", 0.0)), float(given.pop("top_p", 1.0))
        sampled = given.pop("do_sample", temperature > 0)
        if given:
            raise ValueError(f"generation_kwargs: found {sorted(given)[0]!r}, which this model class does not know")
        if temperature < 0 or not 0 < top_p <= 1 or limit < 1:
            raise ValueError(
                f"generation_kwargs: found temperature {temperature}, top_p {top_p}, max_gen_toks {limit}; "
                "wanted at least 0, in (0, 1], and at least 1"
            )
        until = [until] if isinstance(until, str) else until
        return cls(tuple(filter(None, until)), int(limit), temperature if sampled else 0.0, top_p)


@register_model("deepseek-moe")
class DeepseekLM(HFLM):
    """A model of the family under lm-eval.

    Results do not depend on batch size, order or padding (in fp32, exactly).

    Args:
        pretrained: a folder, a name on the Hub, or a model.
        batch_size: rows, or "auto": as many as fit in half of the free memory.
        prefill: what an answer is made to begin with, such as ``"<think>\\n"``; it is part of the prompt.
        cache: "dynamic" or "static".
        journal: keeps every answer as it comes, and gives those it has.
        seed: of sampling.
        add_bos_token: False for a model that was trained without one.
        kwargs: HFLM's.

    Raises:
        ValueError: an unknown cache.
    """

    def __init__(
        self,
        pretrained,
        *,
        batch_size: int | str = "auto",
        prefill: str = "",
        cache: str = "dynamic",
        journal: Journal | None = None,
        seed: int = 1234,
        add_bos_token: bool | None = None,
        **kwargs,
    ):
        if cache not in ("dynamic", "static"):
            raise ValueError(f"cache: found {cache!r}, wanted 'dynamic' or 'static'")
        if isinstance(pretrained, str):
            kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        self.rows = None if str(batch_size) == "auto" else int(batch_size)
        kwargs.setdefault("softmax_dtype", "float32")
        super().__init__(pretrained, batch_size=self.rows or 1, add_bos_token=add_bos_token, **kwargs)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = released_template(self.config.model_type)
        self.model.eval()
        self.prefill, self.cache_kind, self.journal, self.seed = prefill, cache, journal, seed
        self.generated: dict[str, dict] = {}  # of generate_until, by key: text, tokens, truncated

    # -- prompts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids that begin with one BOS, as the family was trained, unless ``add_bos_token`` is False.

        Where the caller does not say, the released tokenizer_config.json does, whose field transformers ignores.
        """
        ids = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        add_bos = released_choice(self.tokenizer) if self.add_bos_token is None else self.add_bos_token
        unwanted = add_special_tokens is False or add_bos is False
        bos = self.tokenizer.bos_token_id
        return ids if unwanted or bos is None or ids[:1] == [bos] else [bos, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """
        Raises:
            ValueError: the tokenizer has no chat template; it ends thinking where ``prefill`` begins it.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.tokenizer.name_or_path}: found no chat template, wanted one: is it a base model?")
        prompt = super().apply_chat_template(chat_history, add_generation_prompt)
        begun = prompt.rstrip().endswith(self.prefill.strip())  # by the template, with or without the line's end
        if self.prefill.strip() == THINK and end_mark(prompt) == THINK_END:
            raise ValueError(
                f"{self.tokenizer.name_or_path}: found a prompt that ends in {THINK_END}, wanted one that {THINK} can follow: "
                'chat_template_args such as {"thinking": true}'
            )
        return prompt if begun else prompt + self.prefill

    # -- generation

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The texts of `outputs`."""
        return [output["text"] for output in self.outputs(requests, disable_tqdm)]

    def outputs(self, requests: list, disable_tqdm: bool = False) -> list[dict]:
        """``{"text", "tokens", "truncated"}`` of each request.

        Raises:
            ValueError: a prompt and its ``max_gen_toks`` that do not fit into the context: no prompt is ever cut.
        """
        keys, seen = [], {}
        for request in requests:  # the k requests of a question are alike: number them
            number = seen[request.args[0]] = seen.get(request.args[0], -1) + 1
            keys.append(request_key("generate_until", request.args, number))
        done = self.journal.answers if self.journal else {}
        self.generated |= {key: done[key] for key in keys if key in done}
        waiting = [
            (key, self.tok_encode(request.args[0]), Settings.read(request.args[1]), request)
            for key, request in zip(keys, requests, strict=True)
            if key not in self.generated
        ]
        self._check_lengths(waiting)
        progress = _Progress(len(requests), len(requests) - len(waiting), disable_tqdm)
        # long prompts first: what needs most memory fails at once, and time left is over- rather than underestimated
        waiting.sort(key=lambda one: (one[2].temperature, one[2].until, -one[2].max_tokens, -len(one[1])))
        while waiting:
            batch = self._next_batch(waiting)
            outputs = self._generate([ids for _, ids, _, _ in batch], [key for key, *_ in batch], batch[0][2])
            answers = {key: output for (key, *_), output in zip(batch, outputs, strict=True)}
            if self.journal:
                self.journal.add(answers)
            self.generated |= answers
            for (_, _, _, request), output in zip(batch, outputs, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, output["text"])
            progress.add(len(batch), sum(output["tokens"] for output in outputs))
        progress.close()
        return [self.generated[key] for key in keys]

    def output(self, prompt: str, settings: dict, repeat: int) -> dict:
        """What `outputs` gave for the ``repeat``-th request of this kind."""
        return self.generated[request_key("generate_until", (prompt, settings), repeat)]

    def _check_lengths(self, waiting: list) -> None:
        for _, ids, settings, _ in waiting:
            if len(ids) + settings.max_tokens > self.max_length:
                raise ValueError(
                    f"found a prompt of {len(ids)} tokens and max_gen_toks {settings.max_tokens}, wanted at most "
                    f"{self.max_length} together, the model's context: fewer tokens (--max-tokens) or examples (--shots)"
                )

    def _next_batch(self, waiting: list) -> list:
        """Take from the front what has the same settings and fits into memory."""
        settings, longest = waiting[0][2], len(waiting[0][1])
        rows = self.rows or self._rows_that_fit(longest + settings.max_tokens)
        count = 1
        while count < min(rows, len(waiting)) and waiting[count][2] == settings:
            count += 1
        batch = waiting[:count]
        del waiting[:count]
        return batch

    def _rows_that_fit(self, tokens: int, logits: int = 0) -> int:
        """Rows of ``length`` tokens; ``logits``: bytes per position and word of the vocabulary."""
        _, free = memory()
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        config, itemsize = self.model.config, self.model.dtype.itemsize
        cache = parameter_breakdown(config).cache_bytes(tokens, itemsize)
        activations = (
            tokens * (8 * config.hidden_size * itemsize + config.vocab_size * logits) + config.vocab_size * 16
        )
        return int(min(MOST_ROWS, max(1, free * MEMORY_SHARE // (cache + activations))))

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], keys: list[str], settings: Settings) -> list[dict]:
        width, pad = max(map(len, prompts)), self._pad_id
        ids = torch.full((len(prompts), width), pad, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=self.device)
            mask[row, width - len(prompt) :] = 1
        ends = self._end_ids
        config = GenerationConfig(
            max_new_tokens=settings.max_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=ends,
            stop_strings=list(settings.until) or None,
        )
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(RowSampler(keys, self.seed, settings.temperature, settings.top_p))
        if self.cache_kind == "static":
            cache = StaticCache(config=self.model.config, max_cache_len=width + settings.max_tokens)
        else:
            cache = DynamicCache(config=self.model.config)
        with (
            self._no_defaults(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            made = self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                **{CACHE_NAME: cache},
                logits_processor=processors,
                tokenizer=self.tokenizer,
            )
        return [self._finish(row.tolist(), settings, ends) for row in made[:, width:]]

    def _finish(self, ids: list[int], settings: Settings, ends: list[int]) -> dict:
        """The text of a row up to its end or first stop string; ``truncated`` where only the token limit ended it."""
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        stops = [at for at in (text.find(stop) for stop in settings.until) if at >= 0]
        ended = end is not None or bool(stops)
        # rows that met a stop string are padded to the batch's width: those tokens were not written
        while end is None and ids and ids[-1] == self._pad_id:
            ids = ids[:-1]
        tokens = len(ids) if end is None else end + 1
        return {"text": text[: min(stops)] if stops else text, "tokens": tokens, "truncated": not ended}

    @contextlib.contextmanager
    def _no_defaults(self):
        """Nothing is inherited from the model's generation_config: ``generate`` fills unset fields from it."""
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = own

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self._end_ids[0] if pad is None else pad

    @property
    def _end_ids(self) -> list[int]:
        """Of the model's generation config, else of the tokenizer."""
        given = self.model.generation_config.eos_token_id
        given = self.tokenizer.eos_token_id if given is None else given
        return given if isinstance(given, list) else [given]

    # -- likelihood

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """
        Raises:
            ValueError: context and continuation that do not fit: no context is ever cut.
        """
        keys, seen = [], {}
        for request in requests:
            number = seen[request.args] = seen.get(request.args, -1) + 1
            keys.append(request_key("loglikelihood", request.args, number))
        done = self.journal.answers if self.journal else {}
        answers = {key: tuple(done[key]) for key in keys if key in done}
        waiting = [(key, request) for key, request in zip(keys, requests, strict=True) if key not in answers]
        longest = max((len(self.tok_encode("".join(request.args))) for _, request in waiting), default=1)
        if longest > self.max_length:
            raise ValueError(
                f"found a context and continuation of {longest} tokens, wanted at most {self.max_length}, the model's "
                "context: fewer examples (--shots)"
            )
        # of each position, logits in the model's dtype and in fp32, and their log-softmax
        self.batch_size_per_gpu = self.rows or self._rows_that_fit(longest, logits=12)
        chunk = 8 * self.batch_size_per_gpu  # between two writes
        progress = _Progress(len(requests), len(requests) - len(waiting), disable_tqdm)
        # neighbours share their context, which HFLM then reads once
        for start in range(0, len(waiting), chunk):
            part = waiting[start : start + chunk]
            given = super().loglikelihood([request for _, request in part], disable_tqdm=True)
            found = {key: answer for (key, _), answer in zip(part, given, strict=True)}
            if self.journal:
                self.journal.add(found)
            answers |= found
            progress.add(len(part), 0)
        progress.close()
        return [answers[key] for key in keys]


class _Progress:
    """A bar over requests with tokens per second and the time left; what was done before counts as done, not as speed."""

    def __init__(self, total: int, done: int, off: bool):
        self.tokens, self.start = 0, time.perf_counter()
        self.bar = tqdm(total=total, initial=done, disable=off, unit="answer", dynamic_ncols=True)

    def add(self, answers: int, tokens: int) -> None:
        self.tokens += tokens
        if self.tokens:
            self.bar.set_postfix_str(f"{self.tokens / (time.perf_counter() - self.start):.3g} tokens/s", refresh=False)
        self.bar.update(answers)

    def close(self) -> None:
        self.bar.close()
