"""What the commands that run a model share: options, loading, streaming, and the figures of a run."""

import copy
import importlib.util
import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.markup import escape
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    FineGrainedFP8Config,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.contents import refuse_file
from modeling_deepseek_moe.checkpoint.headers import LFS_POINTER, refuse_pointer
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.writer import parse_size
from modeling_deepseek_moe.cli._console import plural, rate, size, stderr
from modeling_deepseek_moe.templates import complete_template
from modeling_deepseek_moe.terminal import shown
from modeling_deepseek_moe.tiny import tiny_checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tiktoken.model")
MODEL, SAMPLING, RUNNING = "Model", "Sampling (default: the folder's generation_config.json)", "Running"


class Dtype(StrEnum):
    """What activations, and weights that are not FP8, are computed in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


SHIPPED = "the tiny one that ships"
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="A checkpoint folder.", show_default=SHIPPED, rich_help_panel=MODEL),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        help="The folder of an adapter of peft on this model, as `train --lora` writes it.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
DequantizeOption = Annotated[
    bool, typer.Option("--dequantize", help="Turn FP8 weights into --dtype while loading.", rich_help_panel=MODEL)
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="To compute in; auto: as the checkpoint says.", rich_help_panel=MODEL)
]
TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the tokenizer's Python code that lies in the folder (Kimi, Moonlight).",
        rich_help_panel=MODEL,
    ),
]
TemplateArgumentsOption = Annotated[
    str | None,
    typer.Option(
        "--template-args",
        help="Arguments of the chat template's own, as JSON: '{\"thinking\": true}' for DeepSeek-V3.1.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0, help="0: always the likeliest token.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Only the likeliest tokens of this mass.", rich_help_panel=SAMPLING)
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, help="Sample from the N likeliest tokens only.", rich_help_panel=SAMPLING)
]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=SAMPLING)]
AttentionOption = Annotated[
    str | None,
    typer.Option("--attn", help="eager, sdpa, flex_attention, flash_attention_2 ...", rich_help_panel=RUNNING),
]
ExpertMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        help="Of FP8 experts on a CPU, hold this much (8GB, 500MiB) and read the others from the files as needed.",
        show_default="what is free, if they do not fit",
        rich_help_panel=RUNNING,
    ),
]
StatsOption = Annotated[
    bool,
    typer.Option(
        "--stats", help="Print hit rate of the expert cache, bytes read and stall time.", rich_help_panel=RUNNING
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 ...; auto: GPUs if there are any.", rich_help_panel=RUNNING)
]


def folder_or_tiny(folder: Path | None) -> Path:
    """The folder that was given; without one the tiny checkpoint that ships, which stderr then says."""
    if folder is not None:
        return folder
    stderr().print("[dim]no folder given: the tiny checkpoint that ships[/]")
    return Path(tiny_checkpoint())


def load_model(
    folder: Path,
    *,
    dtype: Dtype,
    attention: str | None,
    device: str,
    dequantize: bool,
    expert_memory: str | None = None,
    adapter: Path | None = None,
) -> PreTrainedModel:
    """The model of a folder, ready to generate.

    Args:
        adapter: the folder of one, whose products are added to the model's.

    Raises:
        ValueError: no usable config or weights, no adapter or one that is not for this model, ``dequantize`` of a checkpoint that is not FP8, or an ``expert_memory``
            that is no size, too small, or for experts that are not mapped from files.
    """
    if expert_memory is not None:
        parse_size(expert_memory)  # before anything is loaded
    _check_folder(folder)
    if adapter is not None:
        _check_adapter(adapter)
    config = read_config(folder)  # says what is wrong, in one line, before transformers looks
    fp8 = getattr(config, "quantization_config", None) is not None
    if dequantize and not fp8:
        raise ValueError(f"{folder}: found no quantization_config, wanted an FP8 checkpoint for --dequantize")
    if device == "auto":
        device_map = "auto" if torch.cuda.is_available() else None
    else:
        device_map = device
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if dequantize else {}
    if attention is not None:
        options["attn_implementation"] = attention
    if adapter is not None and config.num_nextn_predict_layers:
        options["num_nextn_predict_layers"] = (
            0  # nothing here predicts by them, and few adapters have tensors for them
        )
    if not stderr().is_terminal:
        transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype.value, device_map=device_map, **options)
    if expert_memory is not None:
        model.set_expert_memory(expert_memory)
    if adapter is not None:
        model.load_adapter(str(adapter))
    stderr().print(f"[dim]{escape(str(folder))} loaded in {time.perf_counter() - start:.1f} s[/]")
    return model.eval()


def expert_summary(model: PreTrainedModel, meter: "Meter | None" = None) -> str:
    """What the experts of a run cost, in lines: held, hit, read, waited for.

    Args:
        meter: of the run, for its speed.
    """
    stats = model.expert_stats()
    if stats is None:
        return "experts: all in memory or mapped, none were streamed (see --expert-memory)"
    tokens = max(stats.tokens, 1)
    how = {None: "nothing was read", True: "past the page cache", False: "through the page cache"}[stats.direct_io]
    wanted = stats.hits + stats.misses
    rows = [
        ("held", f"{size(stats.held_bytes)} of {size(stats.budget_bytes)}"),
        ("hit rate", f"{stats.hit_rate:.0%}, {stats.hits:,} of {wanted:,} wanted" if wanted else "none was wanted"),
        ("missed", f"{size(stats.bytes_missed)}, {size(stats.bytes_missed / tokens)} a token"),
        ("read", f"{size(stats.bytes_read)} at {size(stats.read_bandwidth or 0)}/s, {how}"),
        ("read ahead", "nothing"),
        ("waited", f"{stats.stall_seconds:.1f} s for the disk, {stats.stall_seconds / tokens * 1e3:.0f} ms per token"),
    ]
    if stats.prefetch_accuracy is not None:
        rows[4] = ("read ahead", f"{size(stats.bytes_prefetched)}, {stats.prefetch_accuracy:.0%} of it wanted")
    if meter is not None and meter.speed is not None:
        rows.insert(0, ("speed", f"{rate(meter.speed)} tokens/s"))
    return "\n".join(["experts", *(f"  {name:<10}  {value}" for name, value in rows)])


def read_template_arguments(text: str | None) -> dict | None:
    """Of ``--template-args``.

    Raises:
        ValueError: no JSON object.
    """
    if text is None:
        return None
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ValueError(f'--template-args: found {text!r}, wanted a JSON object such as {{"thinking": true}}')
    return given


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with a chat template where its release has other means. Nothing of the folder is executed
    unless ``trust_remote_code``.

    Raises:
        ValueError: the folder has none, or one that comes as Python code.
    """
    _check_folder(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder}: found no tokenizer ({', '.join(TOKENIZER_FILES[:2])}), wanted one next to the weights"
        )
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                refuse_pointer(folder / name, file.read(len(LFS_POINTER)))
    if not trust_remote_code and tokenizer_is_code(folder):
        raise ValueError(
            f"{folder}: found a tokenizer that comes as Python code (auto_map in tokenizer_config.json), wanted one "
            "without; if you trust that code: --trust-remote-code"
        )
    # the folder's own advice on its tokenizer class is for its publisher
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    finally:
        transformers.logging.set_verbosity(level)
    if complete_template(tokenizer, folder):
        stderr().print("[dim]the folder has no chat template: prompts as its release encodes them[/]")
    return tokenizer


def tokenizer_is_code(folder: Path) -> bool:
    """Whether the tokenizer needs Python code of the folder: its config names some, and no ``tokenizer.json`` replaces it."""
    config = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not config.is_file():
        return False
    return "AutoTokenizer" in (read_json(config, "a tokenizer's config").get("auto_map") or {})


def _check_folder(folder: Path) -> None:
    refuse_file(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: found no such folder, wanted a checkpoint folder")


def _check_adapter(folder: Path) -> None:
    """
    Raises:
        ValueError: no adapter's folder, or peft is not installed.
    """
    if not (folder / "adapter_config.json").is_file():
        found = "no adapter_config.json" if folder.is_dir() else "no such folder"
        raise ValueError(f"--adapter {folder}: found {found}, wanted the folder of an adapter, as peft writes it")
    if importlib.util.find_spec("peft") is None:
        raise ValueError('--adapter needs peft: pip install "modeling_deepseek_moe[peft]"')


def generation_settings(
    model: PreTrainedModel,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> GenerationConfig:
    """The checkpoint's own generation config with the options laid over it; any sampling option means sampling.

    Raises:
        ValueError: ``top_p`` or ``top_k`` together with ``temperature=0``.
    """
    settings = copy.deepcopy(model.generation_config)
    settings.max_new_tokens, settings.max_length = max_new_tokens, None
    if temperature == 0:
        if top_p is not None or top_k is not None:
            raise ValueError("--temperature 0 takes the likeliest token: --top-p and --top-k have nothing to choose")
        settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
    elif (temperature, top_p, top_k) != (None, None, None):
        settings.do_sample = True
        for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)):
            if value is not None:
                setattr(settings, name, value)
    if settings.pad_token_id is None:  # transformers would say so at every call
        end = settings.eos_token_id
        settings.pad_token_id = end[0] if isinstance(end, list) else end
    return settings


class IdStreamer(BaseStreamer):
    """Prints token ids, comma-separated, as they come: the output of a run without a tokenizer."""

    def __init__(self):
        self.separator = None

    def put(self, value: torch.Tensor) -> None:
        if self.separator is None:  # the prompt
            self.separator = ""
            return
        print(*[f"{self.separator}{token}" for token in value.flatten().tolist()], sep="", end="", flush=True)
        self.separator = ","

    def end(self) -> None:
        print(flush=True)


class Meter(BaseStreamer):
    """Passes tokens on to another streamer and notes when they came. ``cached``: prompt tokens already in the cache."""

    def __init__(self, streamer: BaseStreamer, cached: int = 0):
        self.streamer, self.cached = streamer, cached
        self.prompt_tokens = 0
        self.times: list[float] = []  # of the start, then of every new token

    def put(self, value: torch.Tensor) -> None:
        if not self.times:
            self.prompt_tokens = value.numel()
            self.times.append(time.perf_counter())
        else:
            self.times += [time.perf_counter()] * value.numel()  # several where drafts were accepted
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()

    @property
    def new_tokens(self) -> int:
        return max(len(self.times) - 1, 0)

    @property
    def speed(self) -> float | None:
        """New tokens per second, after the first, which takes the prompt's time."""
        return (self.new_tokens - 1) / max(self.times[-1] - self.times[1], 1e-9) if self.new_tokens > 1 else None

    def summary(self, cache: DynamicCache) -> str:
        """Tokens, speeds and cache of the run, in one line."""
        fed = self.prompt_tokens - self.cached
        parts = [plural(self.prompt_tokens, "prompt token") + (f" ({self.cached:,} cached)" if self.cached else "")]
        if self.new_tokens:
            parts[0] += f" at {_speed(fed, self.times[1] - self.times[0])}"
            parts.append(f"{self.new_tokens:,} new")
        if self.speed is not None:
            parts[1] += f" at {rate(self.speed)} tokens/s"
        held = cache.get_seq_length()
        if held:
            nbytes = cache_bytes(cache)
            parts.append(f"cache {size(nbytes)}, {nbytes // held:,} bytes per token")
        return "; ".join(parts)


def _speed(tokens: int, seconds: float) -> str:
    return f"{rate(tokens / max(seconds, 1e-9))} tokens/s"


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all latents in a cache, and of the indexers' keys."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    tensors += [layer.indexer_keys for layer in layers if getattr(layer, "is_indexer_initialized", False)]
    return sum(tensor.nbytes for tensor in tensors)


def text_streamer(tokenizer: PreTrainedTokenizerBase, special: bool = False) -> TextStreamer:
    """Prints the answer, not the prompt, word by word; ``special`` tokens too, of which some models make calls of tools."""
    return _TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=not special)


class _TextStreamer(TextStreamer):
    """On a terminal, control characters of the text are shown; a file or a pipe gets the text as the model wrote it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(shown(text) if sys.stdout.isatty() else text, stream_end)
