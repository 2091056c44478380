"""``deepseek-moe generate``: continue a text, streaming, and say how fast that went."""

import io
import os
import stat
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, PreTrainedTokenizerBase

from modeling_deepseek_moe.cli import _model, _mtp
from modeling_deepseek_moe.cli._console import stderr
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.tokens import encode_text

QUESTION = "Ada has 3 pens and buys 4 more. How many pens does Ada have now?"  # the tiny checkpoint answers it too


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue.", show_default="from a pipe; without one, a question to answer"),
    ] = None,
    model: _model.ModelOption = None,
    token_ids: Annotated[
        str | None, typer.Option(help="Token ids instead of a text, e.g. 0,9707,11: needs no tokenizer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum new tokens.")] = 256,
    temperature: _model.TemperatureOption = None,
    top_p: _model.TopPOption = None,
    top_k: _model.TopKOption = None,
    seed: _model.SeedOption = None,
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
    """Continue a text with a model, word by word as it is made.

    The text goes to stdout, figures (tokens, tokens per second, cache) to stderr. For a conversation see "chat". On a
    CPU, experts of a model larger than memory are read from the disk as they are needed. Without a prompt it answers a small question; FOLDER in the prompt's place is --model FOLDER.

    Examples:
      [cyan]deepseek-moe generate[/]
      [cyan]deepseek-moe generate --model DeepSeek-V2-Lite "Once upon a time" --temperature 0[/]
      [cyan]deepseek-moe generate -m DeepSeek-V3 -n 64 --seed 7 < prompt.txt > answer.txt[/]
      [cyan]deepseek-moe generate -m DeepSeek-V3 "Once" --mtp --expert-memory 16GB --stats[/]
      [cyan]deepseek-moe generate -m no-tokenizer-here --token-ids 0,1,2[/]
    """
    if model is None and prompt is not None and (Path(prompt) / "config.json").is_file():
        model, prompt = Path(prompt), None
    model = _model.folder_or_tiny(model)
    tokenizer, input_ids = _prompt(model, prompt, token_ids, trust_remote_code)
    use_mtp = _mtp.asked(model, mtp, drafts, adapter)
    how: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device, "dequantize": dequantize}
    loaded = _model.load_model(model, **how, expert_memory=expert_memory, adapter=adapter)
    _check_ids(input_ids, loaded.config.vocab_size)
    settings = _model.generation_settings(loaded, max_new_tokens, temperature, top_p, top_k)
    if seed is not None:
        torch.manual_seed(seed)
    cache = DynamicCache(config=loaded.config)
    meter = _model.Meter(_model.text_streamer(tokenizer) if tokenizer else _model.IdStreamer())
    input_ids = input_ids.to(loaded.device)
    loaded.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=settings,
        **{CACHE_NAME: cache},
        streamer=meter,
        **use_mtp,
    )
    _summarise(loaded, meter, cache, with_drafts=bool(use_mtp), with_experts=stats)


def _summarise(model, meter: _model.Meter, cache: DynamicCache, with_drafts: bool, with_experts: bool) -> None:
    lines = [meter.summary(cache)]
    lines += [_mtp.summary(model)] if with_drafts else []
    lines += [_model.expert_summary(model, meter)] if with_experts else []
    for line in lines:
        stderr().print(f"[dim]{line}[/]", soft_wrap=True)


def _prompt(folder: Path, prompt: str | None, token_ids: str | None, trust_remote_code: bool):
    """The tokenizer (``None`` where token ids were given) and the prompt's ids ``[1, S]``."""
    if token_ids is not None:
        if prompt is not None:
            raise ValueError("found a prompt and --token-ids, wanted one of them")
        try:
            return None, torch.tensor([[int(token) for token in token_ids.split(",")]])
        except ValueError:
            raise ValueError(f"--token-ids: found {token_ids!r}, wanted integers such as 0,9707,11") from None
    if prompt is None:
        prompt = _piped()
    try:
        tokenizer = _model.load_tokenizer(folder, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{error}; --token-ids does without") from None
    ids = _question(tokenizer) if prompt is None else encode_text(tokenizer, prompt)
    if not ids:
        raise ValueError("found an empty prompt, wanted at least one token")
    return tokenizer, torch.tensor([ids], dtype=torch.long)


def _piped() -> str | None:
    """The text from stdin; ``None`` where that is a terminal, /dev/null or closed, so that none was meant.

    Raises:
        ValueError: an empty pipe or file.
    """
    if sys.stdin is None:
        return None
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except io.UnsupportedOperation:  # a Python program put a stream in its place
        return sys.stdin.read() or None
    if stat.S_ISCHR(mode):
        return None
    if text := sys.stdin.read():
        return text
    raise ValueError("stdin: found nothing, wanted a text; from a terminal, without one, a question is asked")


def _question(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `QUESTION`, as a chat where the tokenizer has a template; stderr shows it."""
    stderr().print(f"[dim]no prompt given: {QUESTION}[/]", soft_wrap=True)
    if tokenizer.chat_template is None:
        return encode_text(tokenizer, f"Question: {QUESTION}\nAnswer:")
    chat = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def _check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    bad = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if bad.numel():
        raise ValueError(f"found token id {bad[0].item()}, wanted ids in [0, {vocab_size})")
