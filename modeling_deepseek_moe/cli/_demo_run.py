"""The stages of ``deepseek-moe demo``, each of which prints what it found.

The tiny checkpoint is taught a new kind of problem with `Trainer`, written as bf16 and as a release-format FP8 checkpoint,
read back with `AutoModelForCausalLM.from_pretrained`, and compared with plain transformers on the same weights.
"""

import itertools
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

from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.cli._console import count, size, stderr, stdout
from modeling_deepseek_moe.cli._demo_measure import decode_speeds, fastest_threads, perplexity, resident_bytes
from modeling_deepseek_moe.cli._demo_train import Budget, make_demo_trainer, sharing
from modeling_deepseek_moe.tiny import tiny_checkpoint
from modeling_deepseek_moe.tiny.corpus import Problem
from modeling_deepseek_moe.tiny.recipe import write
from modeling_deepseek_moe.tiny.score import accuracy, held_out, mtp_agreement

DURATION = "About two minutes on two cores: training, then checkpoints, perplexity and decode speed."
HELD_OUT = 100  # problems of each kind
SHORT, LONG = 128, 4096  # context lengths of the speed table
DECODE_TOKENS = 24
SAMPLE_TOKENS = 48
PLAIN, PLAIN_FP8 = "plain transformers, bf16", "plain transformers, FP8 to bf16"
BF16, FP8 = "this package, bf16", "this package, FP8"


def run(out: Path, *, steps: int, seconds: float, seed: int, threads: int | None) -> dict[str, Any]:
    """The whole demo; arguments as the command's. Returns the figures, which ``out/demo.json`` keeps.

    Raises:
        ValueError: ``out`` is a file.
    """
    console, start = stdout(), time.monotonic()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: found a file, wanted a folder to write the demo's checkpoints into")
    transformers.set_seed(seed)

    console.print(f"[dim]{DURATION}[/]", soft_wrap=True)
    tokenizer, model = open_tiny(console)
    asked = {
        "sharing (new)": list(itertools.islice(sharing(seed + 1, held_out=True), HELD_OUT)),
        **{f"{family} (known)": held_out(family, HELD_OUT) for family in ("sum", "choice")},
    }
    rows = held_out_rows(tokenizer, [problem for kind in asked.values() for problem in kind])
    if threads:
        torch.set_num_threads(threads)
    else:
        fastest_threads(model, {name: part[:8] for name, part in rows.items()})
    figures = train(model, tokenizer, asked, out, steps, seconds, seed, console)
    trained = perplexity(model.eval(), rows)
    write_checkpoints(model, tokenizer, out, console)
    del model
    models = load(out)
    figures |= compare(models, rows, trained, console)
    figures["threads"] = torch.get_num_threads()
    torch.set_num_threads(1)  # one token at a time, matrices this small leave nothing to share out
    stream = rows["input_ids"][rows["attention_mask"].bool()]
    figures |= time_decoding({name: models[name] for name in (PLAIN, BF16, FP8)}, stream, console)
    show_sample(models[FP8], tokenizer, [kind[0] for kind in asked.values()], console)
    figures["seconds"] = time.monotonic() - start
    write_file(out / "demo.json", json.dumps(figures, indent=2) + "\n")
    console.print(
        f"\nDone in {figures['seconds']:.0f} s. Talk to it: [cyan]deepseek-moe chat --model {escape(str(out / 'fp8'))}[/]\n"
        f"Losses and expert loads of the training: [cyan]deepseek-moe report {escape(str(out))}[/]",
        soft_wrap=True,
    )
    return figures


def open_tiny(console: Console) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """The checkpoint that ships, its FP8 weights expanded to fp32 so that they can be trained."""
    path = tiny_checkpoint()
    dequantize = transformers.FineGrainedFP8Config(dequantize=True)
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=dequantize, dtype=torch.float32)
    config = model.config
    console.print(
        f"Model: the tiny checkpoint, {config.model_type}, {config.num_hidden_layers} layers, {config.n_routed_experts} "
        f"experts of which {config.num_experts_per_tok} per token, an MTP layer, {count(model.num_parameters())} parameters"
    )
    return AutoTokenizer.from_pretrained(path), model.eval()


def held_out_rows(tokenizer: PreTrainedTokenizerFast, asked: list[Problem]) -> dict[str, torch.Tensor]:
    """A problem a row, ``[N, S]``, padded on the right; labels of padding and of the first token are -100."""
    texts = [tokenizer.apply_chat_template(problem.messages, tokenize=False) for problem in asked]
    rows = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "labels": labels}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: dict[str, list[Problem]],
    out: Path,
    steps: int,
    seconds: float,
    seed: int,
    console: Console,
) -> dict:
    """Train the model in place. Returns what of the held-out problems it answers rightly before and after."""

    def answers() -> dict[str, float]:
        with stderr().status("answering held-out problems"):
            read = [problem for kind in asked.values() for problem in kind[:10]]
            right = {kind: accuracy(model.eval(), tokenizer, problems) for kind, problems in asked.items()}
            return right | {"MTP agreement": mtp_agreement(model, tokenizer, read)}

    before = answers()
    budget = Budget(steps, seconds, stderr())
    trainer = make_demo_trainer(model, tokenizer, out, budget=budget, seed=seed)
    trainer.train()
    trainer.save_state()  # with the expert loads it is what `deepseek-moe report` draws
    after = answers()
    done = trainer.state.global_step
    table = Table("held-out problems, right answers")
    table.add_column("before", justify="right")
    table.add_column(f"after {done} steps", justify="right")
    for name, part in after.items():
        table.add_row(name, f"{before[name]:.0%}", f"{part:.0%}")
    console.print(table)
    if budget.out_of_time:
        console.print(
            f"[yellow]Training stopped after {seconds / 60:.3g} minutes, before step {steps} (--minutes).[/]"
        )
    return {"before": before, "after": after, "steps": done}


def write_checkpoints(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, console: Console) -> None:
    """``out/bf16`` and ``out/fp8``: one model, cast to bf16, in the two formats of the releases."""
    with _quiet():
        write(model, tokenizer, out)
    for name in ("bf16", "fp8"):
        console.print(f"Wrote {escape(str(out / name))}: {size(_weight_bytes(out / name))}")


def load(out: Path) -> dict[str, PreTrainedModel]:
    """What is compared, by name: each folder through this package and through plain transformers' own class."""
    plain = transformers.DeepseekV3ForCausalLM  # the built-in class: the Auto classes give this package's
    bf16 = {"dtype": torch.bfloat16}
    dequantize = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    with _quiet():
        models = {
            PLAIN: plain.from_pretrained(out / "bf16", **bf16),
            PLAIN_FP8: plain.from_pretrained(out / "fp8", **bf16, **dequantize),
            BF16: AutoModelForCausalLM.from_pretrained(out / "bf16"),
            FP8: AutoModelForCausalLM.from_pretrained(out / "fp8"),
        }
    return {name: model.eval() for name, model in models.items()}


def compare(
    models: dict[str, PreTrainedModel], rows: dict[str, torch.Tensor], trained: float, console: Console
) -> dict:
    """Perplexity and memory of every model, as a table; ``trained`` is the perplexity in fp32, before writing."""
    table = Table("held-out text and weights")
    table.add_column("perplexity", justify="right")
    table.add_column("resident", justify="right")
    table.add_column("of it mapped", justify="right")
    table.add_row("as trained, fp32", f"{trained:.3f}", "", "")
    figures = {"perplexity": {"as trained, fp32": trained}, "resident_bytes": {}}
    for name, model in models.items():
        figures["perplexity"][name] = perplexity(model, rows)
        held = resident_bytes(model)
        figures["resident_bytes"][name] = held.total
        mapped = size(held.mapped) if held.mapped else ""
        table.add_row(name, f"{figures['perplexity'][name]:.3f}", size(held.total), mapped)
    console.print(table)
    console.print("Plain transformers leaves the MTP layer out.")
    ratio = figures["perplexity"][FP8] / figures["perplexity"][BF16]
    memory = figures["resident_bytes"][FP8] / figures["resident_bytes"][BF16]
    console.print(f"FP8 against bf16: perplexity {ratio - 1:+.2%}, {memory:.0%} of the bytes.")
    return figures


def time_decoding(models: dict[str, PreTrainedModel], stream: torch.Tensor, console: Console) -> dict:
    """Tokens per second at a short and a long context, as a table, and in words who is faster."""
    table = Table("tokens per second, greedy")
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


def show_sample(model: PreTrainedModel, tokenizer, asked: Iterable[Problem], console: Console) -> None:
    """The answer to each problem, printed as it is made."""
    console.print("\n[bold]Answered by the FP8 checkpoint[/]")
    for problem in asked:
        console.rule(style="dim")
        prompt = tokenizer.apply_chat_template(problem.messages[:1], tokenize=False)
        model.generate(
            **tokenizer(prompt, add_special_tokens=False, return_tensors="pt"),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and warnings off: the files are small, and plain transformers lists each MTP tensor."""
    shown, level = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if shown:
            transformers.logging.enable_progress_bar()


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
