"""Whole models: FP8 resident here compared with plain transformers in bf16 on the same weights; llama.cpp if it is given."""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import common
import torch
import transformers
from cpu_readers import Readers, race, relative_error, row
from decode import filled_caches
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import parameter_breakdown
from modeling_deepseek_moe.compat import CACHE_NAME

# DeepSeek-V2-Lite's dims and vocabulary, with V3's router, as many layers as make 2.25B parameters
CONFIG = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 32768,
    "routed_scaling_factor": 1.0,
}
CONTEXTS = (128, 8192)
PROMPTS = ((512, 0), (4096, 0), (512, 4096))  # tokens, and those that are cached before them
OURS, PLAIN = "FP8, this package", "transformers bf16"
TOKENS = 6  # decoded for one sample: a step alone is too short next to the readers that take turns with it
SAMPLES = 5  # of a turn next to llama.cpp


def measure(options: argparse.Namespace) -> dict:
    for file in options.gguf:  # now rather than after ten minutes
        llama_speed(file, 0, 1, 1, options)
    with contextlib.ExitStack() as stack:
        folder = options.model_folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        seconds = write_model(folder)
        start = time.perf_counter()
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        load = time.perf_counter() - start
        plain = build_plain(folder)
        breakdown, readers, found = parameter_breakdown(ours.config), Readers(in_huge_pages=True), []
        notes = [f"{ours.num_parameters() / 1e9:.2f}B parameters, loaded in {load:.2f} s" + seconds]
        # a prompt first, as ever: it touches all experts, whose pages are mapped at that moment
        for tokens, cached in PROMPTS:
            found += prefill(ours, plain, tokens, cached, options)
        for context in CONTEXTS:
            found += decode(ours, plain, breakdown, context, options, readers)
        agreement = [agree(ours, plain)]
        del plain
        gc.collect()
        found += llama(ours, options)
    return {"rows": found, "agreement": agreement, "notes": notes, "config": CONFIG}


def write_model(folder: Path, config: dict = CONFIG) -> str:
    """Random weights, saved as an FP8 release, unless they are there."""
    if (folder / "config.json").exists():
        return f", weights found in {folder.name}"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**config))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, quantize="fp8")
    return ""


def build_plain(folder: Path, config: dict = CONFIG) -> torch.nn.Module:
    """Plain transformers' model, with the FP8 weights dequantised to bf16."""
    dequantize = FineGrainedFP8Config(dequantize=True)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=dequantize)
    with torch.device("meta"):
        plain = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config)).eval()
    plain.load_state_dict(source.state_dict(), assign=True)
    # what `from_pretrained` would make of a rotary embedding that was built without memory
    plain.model.rotary_emb = type(plain.model.rotary_emb)(plain.config)
    return plain.eval()


def tokens_of(model, cache, tokens: int = TOKENS) -> None:
    """Tokens, one after the other; the cache grows, which is little compared with what it holds."""
    for _ in range(tokens):
        model(torch.randint(0, CONFIG["vocab_size"], (1, 1)), **{CACHE_NAME: cache}, logits_to_keep=1)


def decode(ours, plain, breakdown, context: int, options: argparse.Namespace, readers: Readers) -> list[dict]:
    """One token after the other from ``context`` cached ones on."""
    case = {"case": f"decoding at {context} tokens", "threads": options.threads}
    caches = filled_caches(ours.config, context)
    contestants = {OURS: lambda: tokens_of(ours, caches[0]), PLAIN: lambda: tokens_of(plain, caches[1])}
    times, bandwidth = race(contestants, options.rounds, readers)
    found = list(readers.rows(case, times)) if context == CONTEXTS[0] else []
    for name, weight_format in ((OURS, breakdown.weight_format), (PLAIN, None)):
        nbytes = (breakdown.active_bytes(weight_format) + breakdown.cache_bytes(context)) * TOKENS
        fields = row(case, name, times[name], nbytes, bandwidth)
        fields |= {"tokens_s": TOKENS / times[name].median, "ratio": times[PLAIN].median / times[name].median}
        found.append(fields)
    return found


def prefill(ours, plain, tokens: int, cached: int, options: argparse.Namespace) -> list[dict]:
    after = f" after {cached}" if cached else ""
    case = {"case": f"prefill of {tokens} tokens{after}", "threads": options.threads}
    ids = torch.randint(0, CONFIG["vocab_size"], (1, tokens))
    caches = filled_caches(ours.config, cached) if cached else (None, None)

    def run(model, cache):
        if cached and cache.get_seq_length() > cached:  # take the last round's tokens out again
            cache.crop(cached - cache.get_seq_length())
        model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)

    contestants = {OURS: partial(run, ours, caches[0]), PLAIN: partial(run, plain, caches[1])}
    times, _ = race(contestants, max(3, options.rounds // 2), None)
    best = times[PLAIN].median
    return [
        row(case, name, times[name]) | {"tokens_s": tokens / times[name].median, "ratio": best / times[name].median}
        for name in contestants
    ]


def agree(ours, plain) -> dict:
    """Logits of both for the same tokens: bf16 apart, and whether they name the same next token."""
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 64))
    found, wanted = (model(ids, logits_to_keep=32).logits[0] for model in (ours, plain))
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    return {"relative difference of logits": relative_error(found, wanted.double()), "same next token": same}


def llama_speed(file: Path, context: int, tokens: int, samples: int, options: argparse.Namespace) -> float:
    """Tokens/s of llama.cpp after ``context`` tokens, the median of the samples."""
    command = [str(options.llama_bench), "-m", str(file), "-t", str(options.threads), "-o", "json"]
    command += ["-r", str(samples), "-p", "0", "-n", str(tokens), "-d", str(context)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return statistics.median(json.loads(done.stdout)[0]["samples_ts"])


def llama(ours, options: argparse.Namespace) -> list[dict]:
    """Decoding in turns with llama.cpp's own benchmark of the given files, which is a process of its own each time."""
    found = []
    for context in CONTEXTS if options.gguf else ():
        case = {"case": f"next to llama.cpp, {context} tokens", "threads": options.threads}
        run = partial(tokens_of, ours, filled_caches(ours.config, context)[0])
        speeds: dict[str, list[float]] = {}
        # each process of llama.cpp computes its context again, minutes for a long one
        for _ in range(options.rounds if context == CONTEXTS[0] else min(3, options.rounds)):
            run()  # what the other processes pushed out of the caches
            samples = [TOKENS / common.seconds_of(run) for _ in range(SAMPLES)]
            speeds.setdefault(OURS, []).append(statistics.median(samples))
            for file in options.gguf:
                speed = llama_speed(file, context, TOKENS, SAMPLES, options)
                speeds.setdefault(f"llama.cpp {file.stem}", []).append(speed)
        first = statistics.median(speeds[f"llama.cpp {options.gguf[0].stem}"])
        for name, values in speeds.items():
            speed = statistics.median(values)
            found.append({**case, "contestant": name, "tokens_s": speed, "ms": 1e3 / speed, "ratio": speed / first})
            found[-1]["turns"] = values
    return found
