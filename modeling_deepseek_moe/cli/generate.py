"""``deepseek-moe generate``: continue a text, streaming, and say how fast that went."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import DynamicCache

from modeling_deepseek_moe.cli import _model
from modeling_deepseek_moe.cli._console import stderr
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.tokens import encode_text


def generate(
    model: _model.ModelOption,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue.", show_default="from a pipe, if there is one")
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(help="Token ids instead of a text, e.g. 0,9707,11: needs no tokenizer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum new tokens.")] = 256,
    temperature: _model.TemperatureOption = None,
    top_p: _model.TopPOption = None,
    top_k: _model.TopKOption = None,
    seed: _model.SeedOption = None,
    dtype: _model.DtypeOption = _model.Dtype.AUTO,
    dequantize: _model.DequantizeOption = False,
    trust_remote_code: _model.TrustRemoteCodeOption = False,
    attention: _model.AttentionOption = None,
    device: _model.DeviceOption = "auto",
    expert_memory: _model.ExpertMemoryOption = None,
    stats: _model.StatsOption = False,
) -> None:
    """Continue a text with a model, word by word as it is made.

    The text goes to stdout, figures (tokens, tokens per second, cache) to stderr. For a conversation see "chat".
    On a CPU, the FP8 experts of a model larger than memory are read from the disk as they are needed.

    Examples:
      [cyan]deepseek-moe generate --model DeepSeek-V2-Lite "Once upon a time" --temperature 0[/]
      [cyan]deepseek-moe generate -m DeepSeek-V3 -n 64 --seed 7 < prompt.txt > answer.txt[/]
      [cyan]deepseek-moe generate -m DeepSeek-V3 "Once" -n 16 --expert-memory 16GB --stats[/]
      [cyan]deepseek-moe generate -m no-tokenizer-here --token-ids 0,1,2[/]
    """
    tokenizer, input_ids = _prompt(model, prompt, token_ids, trust_remote_code)
    loaded = _model.load_model(
        model, dtype=dtype, attention=attention, device=device, dequantize=dequantize, expert_memory=expert_memory
    )
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
    )
    stderr().print(f"[dim]{meter.summary(cache)}[/]", soft_wrap=True)
    if stats:
        stderr().print(f"[dim]{_model.expert_summary(loaded, meter)}[/]", soft_wrap=True)


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
        if sys.stdin.isatty():
            raise ValueError('found no prompt, wanted one: deepseek-moe generate --model FOLDER "Once upon a time"')
        prompt = sys.stdin.read()
    try:
        tokenizer = _model.load_tokenizer(folder, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{error}; --token-ids does without") from None
    input_ids = torch.tensor([encode_text(tokenizer, prompt)], dtype=torch.long)
    if not input_ids.numel():
        raise ValueError("found an empty prompt, wanted at least one token")
    return tokenizer, input_ids


def _check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    bad = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if bad.numel():
        raise ValueError(f"found token id {bad[0].item()}, wanted ids in [0, {vocab_size})")
