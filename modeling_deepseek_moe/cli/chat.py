"""``deepseek-moe chat``: a conversation, streaming, on one cache that grows with it."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe.chat_template import answer_message
from modeling_deepseek_moe.cli import _model, _mtp, _template
from modeling_deepseek_moe.cli._calls import result_message, with_calls
from modeling_deepseek_moe.cli._console import plural, stderr
from modeling_deepseek_moe.compat import CACHE_NAME

PROMPT_END = 32  # tokens, among which is the mark that begins a thought, even letter by letter
HELP = "/tool TEXT gives a call its result, /system TEXT sets the system prompt and starts over, /reset starts over, /exit ends."


class Conversation:
    """Messages, and the cache of the tokens that the model has seen of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationConfig,
        arguments: dict | None = None,
        use_mtp: dict[str, int | str] | None = None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.arguments = arguments or {}  # the chat template's own
        self.use_mtp = use_mtp or {}
        self.system: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[dict] = [{"role": "system", "content": self.system}] if self.system else []
        self._results: list[dict] = []  # of some of the last answer's calls
        self._forget()

    @property
    def open_calls(self) -> int:
        """Calls of the last answer that have no result yet."""
        last = self.messages[-1] if self.messages else {}
        return len(last.get("tool_calls", ())) - len(self._results)

    def _forget(self) -> None:
        self.seen: list[int] = []  # the tokens that the cache holds, and the last one made, which is not in it yet
        self.cache = DynamicCache(config=self.model.config)

    def answer(self, text: str) -> _model.Meter:
        """Stream the answer to ``text`` to stdout and keep both.

        Raises:
            ValueError: the conversation is longer than the model's context, or only some of the last answer's calls have results.
        """
        if self._results:
            raise ValueError(
                f"found calls without a result ({self.open_calls}), wanted /tool TEXT for each, or /reset"
            )
        return self._say([{"role": "user", "content": text}])

    def give_result(self, text: str) -> _model.Meter | None:
        """Give the next call of the last answer its result, and stream what is said to the last of them; ``None`` before that.

        Raises:
            ValueError: nothing was called, or as `answer`.
        """
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or "tools" not in self.arguments:
            raise ValueError(
                "/tool: found no answer to give a result to, wanted --tools FILE and an answer that calls one"
            )
        results = [*self._results, result_message(last, len(self._results), text)]
        if len(results) < len(last.get("tool_calls", ())):
            self._results = results
            return None
        meter = self._say(results)
        self._results = []
        return meter

    def _say(self, new: list[dict]) -> _model.Meter:
        """The template renders the whole conversation each time; what it has in common with the tokens seen
        stays in the cache, the rest of the cache is cut off.
        """
        from jinja2 import TemplateError

        messages = [*self.messages, *new]
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **self.arguments
            )
        except TemplateError as error:
            raise ValueError(f"the chat template: {error}") from None
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise ValueError(
                f"the conversation has {plural(len(ids), 'token')}, the model's context {limit:,}: /reset"
            )
        cached = self._keep_common(ids)
        input_ids = torch.tensor([ids], device=self.model.device)
        calling = "tools" in self.arguments
        meter = _model.Meter(_model.text_streamer(self.tokenizer, special=calling), cached)
        try:
            output = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=self.settings,
                **{CACHE_NAME: self.cache},
                streamer=meter,
                **self.use_mtp,
            )
        except BaseException:
            self._forget()  # layers may have got different numbers of tokens
            raise
        self.seen = output[0].tolist()
        said = self.tokenizer.decode(self._without_end(self.seen[len(ids) :]), skip_special_tokens=not calling)
        prompt_end = self.tokenizer.decode(ids[-PROMPT_END:])
        answer = answer_message(self.tokenizer, prompt_end, said)
        self.messages = [*messages, with_calls(answer) if calling else answer]
        return meter

    def _without_end(self, ids: list[int]) -> list[int]:
        """What was said, without the token that ends it."""
        ends = self.settings.eos_token_id
        return ids[:-1] if ids and ids[-1] in (ends if isinstance(ends, list) else [ends]) else ids

    def _keep_common(self, ids: list[int]) -> int:
        """Cut the cache down to the prefix that ``ids`` shares with it, one token of ``ids`` at least left to feed."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self.seen, strict=False)))
        held = self.cache.get_seq_length()
        kept = min(same, held, len(ids) - 1)
        if kept < held:
            self.cache.crop(kept - held)
        return kept


def chat(
    model: _model.ModelOption = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="At most, an answer.")] = 1024,
    temperature: _model.TemperatureOption = None,
    top_p: _model.TopPOption = None,
    top_k: _model.TopKOption = None,
    seed: _model.SeedOption = None,
    thinking: _template.ThinkingOption = None,
    tools: _template.ToolsOption = None,
    template_args: _model.TemplateArgumentsOption = None,
    adapter: _model.AdapterOption = None,
    dtype: _model.DtypeOption = _model.Dtype.AUTO,
    dequantize: _model.DequantizeOption = False,
    trust_remote_code: _model.TrustRemoteCodeOption = False,
    attention: _model.AttentionOption = None,
    device: _model.DeviceOption = "auto",
    expert_memory: _model.ExpertMemoryOption = None,
    mtp: _mtp.MtpOption = False,
    drafts: _mtp.DraftsOption = None,
    stats: _model.StatsOption = False,
) -> None:
    """Talk to a model, in the chat template of its tokenizer.

    Within the conversation: /system TEXT sets the system prompt and starts over, /reset starts over, /exit ends;
    /tool TEXT gives a call of the last answer its result, one after the other, and the last of them is answered;
    Ctrl-C stops an answer. From a pipe every line is one message. The cache is kept from turn to turn.

    Examples:
      [cyan]deepseek-moe chat[/]
      [cyan]deepseek-moe chat --model DeepSeek-V2-Lite-Chat[/]
      [cyan]deepseek-moe chat -m DeepSeek-V3 --system "Answer in French." --temperature 0.6[/]
      [cyan]deepseek-moe chat -m DeepSeek-V3.2 --thinking --tools tools.json[/]
      [cyan]deepseek-moe chat -m GLM-4.7-Flash --template-args '{"clear_thinking": false}'[/]
      [cyan]deepseek-moe chat -m DeepSeek-V3 --expert-memory 16GB --stats[/]
      [cyan]deepseek-moe chat -m DeepSeek-V3 --mtp[/]
      [cyan]printf 'Hi!\\nAnd in German?\\n' | deepseek-moe chat -m DeepSeek-V3[/]
    """
    model = _model.folder_or_tiny(model)
    tokenizer = _model.load_tokenizer(model, trust_remote_code)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{model}: found a tokenizer without chat template (chat_template in tokenizer_config.json, or "
            "chat_template.jinja); a base model continues text: deepseek-moe generate"
        )
    arguments = _template.template_arguments(tokenizer, template_args, thinking, tools)
    use_mtp = _mtp.asked(model, mtp, drafts, adapter)
    how: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device, "dequantize": dequantize}
    loaded = _model.load_model(model, **how, expert_memory=expert_memory, adapter=adapter)
    settings = _model.generation_settings(loaded, max_new_tokens, temperature, top_p, top_k)
    if seed is not None:
        torch.manual_seed(seed)
    conversation = Conversation(loaded, tokenizer, settings, arguments, use_mtp)
    conversation.system = system
    conversation.reset()
    _converse(conversation, stats)


def _converse(conversation: Conversation, stats: bool) -> None:
    console = stderr()
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[dim]{HELP}[/]")
    for text in _lines(interactive):
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
            console.print("[dim]started over[/]")
        elif command == "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
            console.print(f"[dim]started over with the system prompt {escape(repr(rest.strip()))}[/]")
        elif command == "/tool":
            _turn(conversation, partial(conversation.give_result, rest.strip()), interactive, stats)
        elif command.startswith("/") and command[1:].isalpha():
            console.print(f"[yellow]{escape(command)} is no command.[/] {HELP}")
        else:
            _turn(conversation, partial(conversation.answer, text), interactive, stats)


def _turn(
    conversation: Conversation, speak: Callable[[], _model.Meter | None], interactive: bool, stats: bool
) -> None:
    console = stderr()
    if stats:
        conversation.model.expert_stats(reset=True)  # figures are of one turn
    try:
        meter = speak()
    except KeyboardInterrupt:
        if not interactive:
            raise
        console.print("\n[dim]stopped; that turn is forgotten[/]")
    except ValueError as error:
        if not interactive:
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}")
    else:
        calls = conversation.open_calls
        if calls:
            console.print(f"[dim]{plural(calls, 'call')} to give a result to: /tool TEXT[/]")
        if meter is None:
            return
        console.print(f"[dim]{meter.summary(conversation.cache)}[/]", soft_wrap=True)
        if conversation.use_mtp:
            console.print(f"[dim]{_mtp.summary(conversation.model)}[/]", soft_wrap=True)
        if stats:
            console.print(f"[dim]{_model.expert_summary(conversation.model, meter)}[/]", soft_wrap=True)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, or the lines of a pipe; empty lines left out."""
    if interactive:
        import readline  # noqa: F401 (line editing and history for `input`)
    while True:
        try:
            line = input("\n> ") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()
