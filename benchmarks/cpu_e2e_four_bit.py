"""Whole models in four bits next to FP8, the same weights, with heads as released and quantised; llama.cpp if it is given."""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import common
import torch
from cpu_e2e import CONFIG, CONTEXTS, SAMPLES, llama_speed, tokens_of, write_model
from cpu_readers import Readers, race, relative_error, row
from decode import filled_caches
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import parameter_breakdown
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import requested

RELEASED, FP8, INT4, NF4 = "FP8, head bf16", "FP8, head FP8", "INT4, head INT4", "NF4, head NF4"
# folder and how it is made from another one: the conversion, its source and options
FOLDERS = {
    RELEASED: "model",
    FP8: "model-fp8-head",
    INT4: "model-int4-head",
    NF4: "model-nf4-head",
}
CONVERSIONS = {
    FP8: (("fp8-to-bf16",), ("bf16-to-fp8", "--head", "fp8")),
    INT4: (("to-4bit", "--format", "int4", "--head", "4bit"),),
    NF4: (("to-4bit", "--format", "nf4", "--head", "4bit"),),
}
PROMPT = 512
# Of a sample. After another model's turn the first finds nothing of its own in the caches and takes half as long again, and some
# fifteen are slower than those to come: a text's are as the latter.
TOKENS = 64
WARM_UP = 2  # samples
# what a model in four bits is compared with: the FP8 model whose head is quantised as its own
PEERS = {RELEASED: RELEASED, FP8: FP8, INT4: FP8, NF4: FP8}


def measure(options: argparse.Namespace) -> dict:
    for file in options.gguf:  # now rather than after ten minutes
        llama_speed(file, 0, 1, 1, options)
    with contextlib.ExitStack() as stack:
        base = options.model_folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / FOLDERS[RELEASED]
        write_model(base)
        models = {}
        for name, folder in folders(base).items():
            models[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        agreement, readers, found = agree(models), Readers(in_huge_pages=True), []
        found += prefill(models, options)
        for context in CONTEXTS:
            found += decode(models, context, options, readers)
        del models[RELEASED]  # whose files have no place in memory next to llama.cpp's
        for context in options.llama_contexts if options.gguf else ():
            found += in_turns(models, context, options)
    notes = [
        f"instruction set: {instruction_set()}",
        f"llama.cpp: {', '.join(file.name for file in options.gguf) or 'not given'}",
    ]
    return {"rows": found, "agreement": agreement, "notes": notes, "config": CONFIG}


def folders(base: Path) -> dict[str, Path]:
    """The FP8 release and what conversions make of it, written next to it unless it is there."""
    found = {name: base if name == RELEASED else base.with_name(folder) for name, folder in FOLDERS.items()}
    for name, steps in CONVERSIONS.items():
        source = base
        with tempfile.TemporaryDirectory(dir=base.parent) as between:
            for number, (conversion, *flags) in enumerate(steps if not found[name].exists() else (), 1):
                out = found[name] if number == len(steps) else Path(between) / conversion
                command = [sys.executable, "-m", "modeling_deepseek_moe.conversion", conversion, str(source), str(out)]
                subprocess.run([*command, *flags], check=True)
                source = out
    return found


def instruction_set() -> str:
    """What ``DEEPSEEK_MOE_BACKEND=cpu:avx2`` and the like ask for, or the best."""
    return requested().isa or (_native.instruction_sets() or ("none",))[-1]


def agree(models: dict) -> list[dict]:
    """Logits of the same tokens, apart from the released model's: random weights of four bits are a tenth off."""
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 64))
    logits = {name: model(ids, logits_to_keep=32).logits[0] for name, model in models.items()}
    wanted = logits.pop(RELEASED).double()
    return [{"model": name, "relative difference of logits": relative_error(logits[name], wanted)} for name in logits]


def decode(models: dict, context: int, options: argparse.Namespace, readers: Readers) -> list[dict]:
    """One token after the other from ``context`` cached ones on; ratio: of tokens/s, with the peer's (`PEERS`)."""
    case = {"case": f"decoding at {context} tokens", "threads": options.threads}
    caches = {name: filled_caches(model.config, context)[0] for name, model in models.items()}
    contestants = {name: partial(turn, model, caches[name], context) for name, model in models.items()}
    times, bandwidth = race(contestants, 2 * options.rounds, readers)
    found = list(readers.rows(case, times)) if context == CONTEXTS[0] else []
    for name, model in models.items():
        breakdown = parameter_breakdown(model.config)
        nbytes = breakdown.active_bytes(breakdown.weight_format) + breakdown.cache_bytes(context)
        fields = row(case, name, times[name], nbytes * TOKENS, bandwidth) | {"bytes": int(nbytes)}
        fields |= {"tokens_s": TOKENS / times[name].median, "ratio": times[PEERS[name]].median / times[name].median}
        found.append(fields | {"ratio_to_released": times[RELEASED].median / times[name].median})
    return found


def turn(model, cache, context: int) -> None:
    """A sample's tokens, from ``context`` cached ones on: those of the last sample are taken out again."""
    if added := cache.get_seq_length() - context:
        cache.crop(-added)
    tokens_of(model, cache, TOKENS)


def prefill(models: dict, options: argparse.Namespace) -> list[dict]:
    case = {"case": f"prefill of {PROMPT} tokens", "threads": options.threads}
    ids = torch.randint(0, CONFIG["vocab_size"], (1, PROMPT))

    def run(model):
        model(ids, **{CACHE_NAME: None}, use_cache=True, logits_to_keep=1)

    times, _ = race({name: partial(run, model) for name, model in models.items()}, max(3, options.rounds // 2), None)
    return [
        row(case, name, times[name])
        | {"tokens_s": PROMPT / times[name].median, "ratio": times[PEERS[name]].median / times[name].median}
        for name in models
    ]


def in_turns(models: dict, context: int, options: argparse.Namespace) -> list[dict]:
    """Decoding in turns with llama.cpp's own benchmark of the given files; ratio: with the first of these."""
    case = {"case": f"next to llama.cpp, {context} tokens", "threads": options.threads}
    caches = {name: filled_caches(model.config, context)[0] for name, model in models.items()}
    runs = {name: partial(turn, model, caches[name], context) for name, model in models.items()}
    speeds: dict[str, list[float]] = {}
    # each process of llama.cpp computes its context again, minutes for a long one
    for _ in range(options.rounds if context == CONTEXTS[0] else max(1, options.rounds // 4)):
        for file in options.gguf:
            speeds.setdefault(f"llama.cpp {file.stem}", []).append(
                llama_speed(file, context, TOKENS, SAMPLES, options)
            )
        for name, run in runs.items():
            for _ in range(WARM_UP):  # reads what was dropped from memory meanwhile: tokens choose experts one by one
                run()
            samples = [TOKENS / common.seconds_of(run) for _ in range(SAMPLES)]
            speeds.setdefault(name, []).append(statistics.median(samples))
    found = []
    for name, values in speeds.items():
        found.append({**case, "contestant": name, "tokens_s": statistics.median(values), "turns": values})
    first = found[0]["tokens_s"]
    return [fields | {"ms": 1e3 / fields["tokens_s"], "ratio": fields["tokens_s"] / first} for fields in found]
