"""``deepseek-moe bench``: how fast a model runs on this machine, measured, next to what ``plan`` expects."""

import contextlib
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from modeling_deepseek_moe.anatomy import ParameterBreakdown, parameter_breakdown, read_config
from modeling_deepseek_moe.cache import update_indexer
from modeling_deepseek_moe.cli import _model
from modeling_deepseek_moe.cli._console import count, plural, print_json, rate, size, stderr, stdout
from modeling_deepseek_moe.machine import measure_read_bandwidth, memory, threads
from modeling_deepseek_moe.planning import MEMORY_EFFICIENCY

CONTEXTS = (128, 2048)
PREFILL = 512


def bench(
    path: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint folder; or a config.json, for random weights.", show_default=_model.SHIPPED),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Tokens in the cache while decoding.", show_default="128 and 2048, or the model's most"
        ),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt that is read.", show_default="512, or the model's most"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode in each of the repeats.")] = 8,
    repeat: Annotated[int, typer.Option(min=1, help="Times to measure everything.")] = 3,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of layers, of random weights.", show_default="all")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to use.", show_default="as torch does")] = None,
    expert_memory: _model.ExpertMemoryOption = None,
    adapter: _model.AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure loading, reading a prompt, and decoding on this machine's CPU.

    Decoding reads every active weight and the cache once per token: the memory bandwidth, measured in between, bounds
    it, and the share of that bound is shown. A config.json alone will do: random weights in its shapes are as fast
    as trained ones. They are written to a temporary folder as an FP8 checkpoint; --layers makes them small.

    Examples:
      [cyan]deepseek-moe bench[/]
      [cyan]deepseek-moe bench DeepSeek-V2-Lite[/]
      [cyan]deepseek-moe bench DeepSeek-V2-Lite --context 8192 --prefill 2048 --json[/]
      [cyan]deepseek-moe bench DeepSeek-V3/config.json --layers 4[/]
    """
    path = _model.folder_or_tiny(path)
    lengths = _lengths(read_config(path).max_position_embeddings, context, prefill, tokens * (repeat + 1))
    if threads is not None:
        torch.set_num_threads(threads)
    if layers is not None and path.is_dir() and any(path.glob("*.safetensors")):
        raise ValueError(f"{path}: found weights; --layers is for random ones: name the config.json")
    transformers.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        folder = path
        if path.is_file() or not any(path.glob("*.safetensors")):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "random"
            with stderr().status("writing random weights"):
                _write_random(path, layers, folder)
        start = time.perf_counter()
        model = _load(folder, expert_memory, adapter)
        load = time.perf_counter() - start
        fields = _measure(model, *lengths, tokens, repeat) | {"load_seconds": load}
    if as_json:
        print_json(fields)
    else:
        _show(fields, stdout())


def _lengths(most: int, contexts: list[int] | None, prefill: int | None, decoded: int) -> tuple[tuple[int, ...], int]:
    """The contexts and the prompt to measure: as asked for, or the defaults, cut to a model of ``most`` tokens.

    ``decoded`` tokens are decoded after each context.

    Raises:
        ValueError: what was asked for does not fit into the model.
    """
    room = most - decoded
    if room < 1:
        raise ValueError(
            f"--tokens and --repeat: found {decoded:,} tokens to decode, wanted fewer than {most:,}, the model's most"
        )
    if contexts and max(contexts) > room:
        raise ValueError(
            f"--context: found {max(contexts):,}, wanted at most {room:,}: the model's {most:,} less {decoded:,} to decode"
        )
    if prefill is not None and prefill > most:
        raise ValueError(f"--prefill: found {prefill:,}, wanted at most {most:,}, the model's most")
    contexts = contexts or [min(length, room) for length in CONTEXTS]
    return tuple(dict.fromkeys(contexts)), prefill or min(PREFILL, most)


def _write_random(path: Path, layers: int | None, folder: Path) -> None:
    """An FP8 checkpoint of random weights in the shapes of a config, with its first layers only."""
    config = copy.deepcopy(read_config(path))
    config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    config.num_nextn_predict_layers = 0
    for name in ("quantization_config", "layer_types"):
        if hasattr(config, name):
            delattr(config, name)
    needed, (_, available) = 2 * parameter_breakdown(config).parameters, memory()
    if needed > available:
        raise ValueError(
            f"{path}: random weights of {config.num_hidden_layers} layers take {size(needed)} while they are made, found "
            f"{size(available)} available: fewer --layers"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, quantize="fp8")


def _load(folder: Path, expert_memory: str | None, adapter: Path | None) -> PreTrainedModel:
    how: dict[str, Any] = {"dtype": _model.Dtype.AUTO, "attention": None, "device": "cpu", "dequantize": False}
    return _model.load_model(folder, **how, expert_memory=expert_memory, adapter=adapter)


@torch.inference_mode()
def _measure(model: PreTrainedModel, contexts: tuple[int, ...], prefill: int, tokens: int, repeat: int) -> dict:
    config, breakdown = model.config, parameter_breakdown(model.config)
    caches = {length: _filled(model, length) for length in contexts}
    ids = torch.randint(0, config.vocab_size, (1, prefill))
    bandwidths, prompts, steps = [], [], {length: [] for length in contexts}
    for turn in range(repeat + 1):  # the first is to warm up
        with stderr().status(f"measuring, {turn} of {repeat}"):
            bandwidth = measure_read_bandwidth(seconds=0.3).bytes_per_second
            seconds = _seconds(lambda: model(ids, use_cache=True, logits_to_keep=1))
            for length, cache in caches.items():
                steps[length].append(_seconds(lambda cache=cache: _decode(model, cache, tokens)) / tokens)
            bandwidths.append(bandwidth)
            prompts.append(seconds)
    bandwidth = statistics.median(bandwidths[1:])
    return {
        "parameters": breakdown.parameters,
        "active_parameters": breakdown.active_parameters,
        "threads": threads(),
        "bandwidth": bandwidth,
        "resident_bytes": psutil.Process().memory_info().rss,
        "prefill": {"tokens": prefill, "tokens_per_second": prefill / statistics.median(prompts[1:])},
        "decode": [_decoded(breakdown, length, steps[length][1:], bandwidth) for length in contexts],
        "experts": _model.expert_summary(model) if model.expert_stats() else None,
    }


def _decoded(breakdown: ParameterBreakdown, context: int, seconds: list[float], bandwidth: float) -> dict:
    read = breakdown.active_bytes(breakdown.weight_format) + breakdown.cache_read_bytes(context)
    taken = statistics.median(seconds)
    return {
        "context": context,
        "tokens_per_second": 1 / taken,
        "best_tokens_per_second": 1 / min(seconds),
        "bytes_per_token": read,
        "share_of_bandwidth": read / taken / bandwidth,
        "planned_tokens_per_second": bandwidth / read * MEMORY_EFFICIENCY,
    }


def _filled(model: PreTrainedModel, length: int) -> DynamicCache:
    """A cache of random latents, and indexers' keys: as fast to attend to as a prompt's."""
    config, cache = model.config, DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):
        latents = [
            torch.randn(1, 1, length, dim, dtype=model.dtype) for dim in (config.kv_lora_rank, config.qk_rope_head_dim)
        ]
        if config.has_indexer(layer):
            update_indexer(cache, torch.randn(1, length, config.index_head_dim, dtype=model.dtype), layer)
        cache.update(*latents, layer)
    return cache


def _decode(model: PreTrainedModel, cache: DynamicCache, tokens: int) -> None:
    for _ in range(tokens):
        ids = torch.randint(0, model.config.vocab_size, (1, 1))
        model(ids, cache=cache, logits_to_keep=1)


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _show(fields: dict, console: Console) -> None:
    console.print(
        f"{count(fields['parameters'])} parameters, {count(fields['active_parameters'])} active per token; loaded in "
        f"{fields['load_seconds']:.1f} s; {size(fields['resident_bytes'])} resident"
    )
    console.print(f"memory gives {size(fields['bandwidth'])}/s to {plural(fields['threads'], 'thread')}")
    console.print()
    table = Table(box=None, header_style="dim", pad_edge=False)
    for header in ("", "tokens/s", "best", "plan", "read per token", "of bandwidth"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    prompt = fields["prefill"]
    table.add_row(f"prompt of {prompt['tokens']:,}", rate(prompt["tokens_per_second"]))
    for row in fields["decode"]:
        speeds = (row["tokens_per_second"], row["best_tokens_per_second"], row["planned_tokens_per_second"])
        table.add_row(
            f"decoding at {row['context']:,}",
            *map(rate, speeds),
            size(row["bytes_per_token"]),
            f"{row['share_of_bandwidth']:.0%}",
        )
    console.print(table)
    if fields["experts"]:
        console.print(fields["experts"])
