"""The stages of ``deepseek-moe demo``, each of which prints what it found.

A small DeepSeek-V3 is trained with `Trainer`, written as bf16 and as a release-format FP8 checkpoint, read back with
`AutoModelForCausalLM.from_pretrained`, and measured beside plain transformers on the same weights.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from modeling_deepseek_moe.cli import _demo_model as small
from modeling_deepseek_moe.cli._console import count, size, stderr, stdout
from modeling_deepseek_moe.cli._demo_measure import decode_speeds, fastest_threads, perplexity, resident_bytes
from modeling_deepseek_moe.cli._demo_text import write_corpus
from modeling_deepseek_moe.modeling import DeepseekV3ForCausalLM

SHARED_TEXT = Path("../shared/data/tinyshakespeare.txt")
OWN_PROMPTS = (
    "Question: On which river does Halden lie?\nAnswer:",
    "A note on latent attention.",
    "One frosty morning in winter,",
)
HELD_OUT_ROWS = 128
SHORT, LONG = 128, 4096  # context lengths of the speed table
DECODE_TOKENS = 24
SAMPLE_TOKENS = 100
PLAIN, PLAIN_FP8 = "plain transformers, bf16", "plain transformers, FP8 to bf16"
BF16, FP8 = "this package, bf16", "this package, FP8"


def run(out: Path, text: Path | None, *, steps: int, seconds: float, seed: int, threads: int | None) -> dict[str, Any]:
    """The whole demo; arguments as the command's. Returns the figures, which ``out/demo.json`` keeps."""
    console, start = stdout(), time.monotonic()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: found a file, wanted a folder to write the demo's checkpoints into")
    transformers.set_seed(seed)

    documents, prompts = read_documents(text, console)
    train_documents, held_out = split_documents(documents)
    tokenizer = small.train_tokenizer(train_documents)
    rows = make_parts(tokenizer, train_documents, held_out)
    prompts = prompts or [opening(document) for document in held_out[:: max(1, len(held_out) // 3)][:3]]

    model = make_model(tokenizer, console)
    if threads:
        torch.set_num_threads(threads)
    else:
        fastest_threads(model, rows["train"][: small.BATCH_ROWS])
    figures = train(model, rows, out, steps, seconds, seed, console)
    trained = perplexity(model.eval(), rows["held out"])
    write_checkpoints(model, tokenizer, out, console)
    del model
    models = load(out)
    figures |= compare(models, rows["held out"], trained, console)
    figures["threads"] = torch.get_num_threads()
    torch.set_num_threads(1)  # one token at a time, matrices this small leave nothing to share out
    figures |= time_decoding({name: models[name] for name in (PLAIN, BF16, FP8)}, rows["train"], console)
    show_sample(models[FP8], AutoTokenizer.from_pretrained(out / "fp8"), prompts, console)
    figures["seconds"] = time.monotonic() - start
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"\nDone in {figures['seconds']:.0f} s. Talk to it: [cyan]deepseek-moe chat --model {out / 'fp8'}[/]"
    )
    return figures


def read_documents(text: Path | None, console: Console) -> tuple[list[str], tuple[str, ...]]:
    """The documents of the text (blank lines part them, or line ends if there are few), and prompts that suit it.

    Raises:
        ValueError: there is no such file, it is not UTF-8 text, or it has a single line.
    """
    if text is None and SHARED_TEXT.is_file():
        text = SHARED_TEXT
    prompts = ()
    if text is None:
        content, name, prompts = write_corpus(), "the demo's own (stories, entries, questions, sums)", OWN_PROMPTS
    else:
        if not text.is_file():
            raise ValueError(f"{text}: found no such file, wanted a text to train on")
        try:
            content, name = text.read_text(encoding="utf-8"), str(text)
        except UnicodeDecodeError as error:
            raise ValueError(f"{text}: found no UTF-8 text ({error})") from None
    documents = [document for document in content.split("\n\n") if document.strip()]
    if len(documents) < 100:
        documents = [line for line in content.splitlines() if line.strip()]
    if len(documents) < 2:
        raise ValueError(f"too little text: found {len(documents)} paragraphs or lines in {name}, wanted at least 2")
    console.print(f"Text: {escape(name)}, {size(len(content.encode()))}, {len(documents):,} documents")
    return documents, prompts


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """The last tenth is held out."""
    held_out = max(1, len(documents) // 10)
    return documents[:-held_out], documents[-held_out:]


def opening(document: str) -> str:
    """The first line if it is short, else the first words: something to continue."""
    first, newline, _ = document.partition("\n")
    return first + newline if len(first) < 40 else " ".join(first.split()[:6])


def make_parts(tokenizer: PreTrainedTokenizerFast, train: list[str], held_out: list[str]) -> dict[str, torch.Tensor]:
    """Rows to train on and rows to measure on.

    Raises:
        ValueError: there is too little text for one batch to train on and one row to measure on.
    """
    rows = {"train": small.make_rows(tokenizer, train), "held out": small.make_rows(tokenizer, held_out)}
    for part, wanted in (("train", small.BATCH_ROWS), ("held out", 1)):
        if len(rows[part]) < wanted:
            raise ValueError(
                f"too little text: found {len(rows[part])} rows of {small.BLOCK_TOKENS} tokens to use as {part!r}, "
                f"wanted {wanted}"
            )
    rows["held out"] = rows["held out"][:HELD_OUT_ROWS]
    return rows


def make_model(tokenizer: PreTrainedTokenizerFast, console: Console) -> PreTrainedModel:
    """The model at its random start."""
    config = small.make_config(tokenizer)
    model = DeepseekV3ForCausalLM(config)
    console.print(
        f"Model: deepseek_v3, {config.num_hidden_layers} layers, {config.n_routed_experts} experts of which "
        f"{config.num_experts_per_tok} a token, {count(model.num_parameters())} parameters, "
        f"{len(tokenizer):,} tokens in the vocabulary; no MTP layer: the Trainer's loss would not train it"
    )
    return model


def train(
    model: PreTrainedModel,
    rows: dict[str, torch.Tensor],
    out: Path,
    steps: int,
    seconds: float,
    seed: int,
    console: Console,
) -> dict:
    """Train the model in place, in fp32. Returns the loss on held-out text before and after."""
    budget = small.Budget(steps, seconds, stderr())
    trainer = small.make_trainer(model, rows, str(out), budget=budget, seed=seed)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    state = trainer.state
    console.print(
        f"Loss on held-out text: [bold]{before:.3f}[/] before, [bold]{after:.3f}[/] after {state.global_step} steps "
        f"({state.epoch:.1f} passes over {count(rows['train'].numel())} tokens)"
    )
    if budget.out_of_time:
        console.print(
            f"[yellow]Training stopped after {seconds / 60:.3g} minutes, before step {steps} (--minutes).[/]"
        )
    return {"loss_before": before, "loss_after": after, "steps": state.global_step}


def write_checkpoints(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, console: Console) -> None:
    """``out/bf16`` and ``out/fp8``: one model, cast to bf16, in the two formats of the releases."""
    model.to(torch.bfloat16)
    for name, quantize in (("bf16", None), ("fp8", "fp8")):
        with _no_bars():
            model.save_pretrained(out / name, quantize=quantize)
        tokenizer.save_pretrained(out / name)
        console.print(f"Wrote {escape(str(out / name))}: {size(_weight_bytes(out / name))}")


def load(out: Path) -> dict[str, PreTrainedModel]:
    """What is compared, by name: each folder through this package and through plain transformers' own class."""
    plain = transformers.DeepseekV3ForCausalLM  # the built-in class: the Auto classes give this package's
    bf16 = {"dtype": torch.bfloat16}
    dequantize = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    with _no_bars():
        models = {
            PLAIN: plain.from_pretrained(out / "bf16", **bf16),
            PLAIN_FP8: plain.from_pretrained(out / "fp8", **bf16, **dequantize),
            BF16: AutoModelForCausalLM.from_pretrained(out / "bf16"),
            FP8: AutoModelForCausalLM.from_pretrained(out / "fp8"),
        }
    return {name: model.eval() for name, model in models.items()}


def compare(models: dict[str, PreTrainedModel], held_out: torch.Tensor, trained: float, console: Console) -> dict:
    """Perplexity and memory of every model, as a table; ``trained`` is the perplexity in fp32, before writing."""
    table = Table("held-out text and weights")
    table.add_column("perplexity", justify="right")
    table.add_column("resident", justify="right")
    table.add_column("of it mapped", justify="right")
    table.add_row("as trained, fp32", f"{trained:.3f}", "", "")
    figures = {"perplexity": {"as trained, fp32": trained}, "resident_bytes": {}}
    for name, model in models.items():
        figures["perplexity"][name] = perplexity(model, held_out)
        held = resident_bytes(model)
        figures["resident_bytes"][name] = held.total
        mapped = size(held.mapped) if held.mapped else ""
        table.add_row(name, f"{figures['perplexity'][name]:.3f}", size(held.total), mapped)
    console.print(table)
    ratio = figures["perplexity"][FP8] / figures["perplexity"][BF16]
    memory = figures["resident_bytes"][FP8] / figures["resident_bytes"][BF16]
    console.print(f"FP8 against bf16: perplexity {ratio - 1:+.2%}, {memory:.0%} of the bytes.")
    return figures


def time_decoding(models: dict[str, PreTrainedModel], rows: torch.Tensor, console: Console) -> dict:
    """Tokens a second at a short and a long context, as a table, and in words who is faster."""
    stream = rows.flatten()
    table = Table("tokens a second, greedy")
    speeds = {}
    for context in (SHORT, LONG):
        table.add_column(f"context {context:,}", justify="right")
        with stderr().status(f"timing at a context of {context:,} tokens"):
            ids = stream.repeat(-(-context // len(stream)))[:context].unsqueeze(0)
            speeds[context] = decode_speeds(models, ids, DECODE_TOKENS)
    for name in models:
        table.add_row(name, *(f"{speed[name]:.1f}" for speed in speeds.values()))
    console.print(table)
    console.print(f"Batch 1, one thread; medians of {DECODE_TOKENS} tokens, taken in turns.")
    for context, speed in speeds.items():
        against = ", ".join(f"{name.split(', ')[1]} at {speed[name] / speed[PLAIN]:.2f}×" for name in (BF16, FP8))
        console.print(f"At {context:,} tokens this package decodes {against} the speed of plain transformers in bf16.")
    return {"tokens_per_second": {str(context): speed for context, speed in speeds.items()}}


def show_sample(model: PreTrainedModel, tokenizer, prompts: Iterable[str], console: Console) -> None:
    """A continuation of each prompt, printed as it is made."""
    console.print("\n[bold]Written by the FP8 checkpoint[/]")
    for prompt in prompts:
        console.rule(style="dim")
        model.generate(
            **tokenizer(prompt, return_tensors="pt"),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            temperature=0.7,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' own progress bars off: these files are written and read in a moment."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
