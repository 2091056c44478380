"""Kimi-K2's layers in INT4 and in FP8: bytes resident per parameter, tokens per second, and a save to the bit.

    python benchmarks/kimi.py                          a few minutes; 11 GB of memory, 16 GB below /tmp
    python benchmarks/kimi.py --folder FOLDER          the releases written there, 11 GB, or found; saves take 5 GB more
    python benchmarks/kimi.py --quick                  a tiny model, which shows that all runs; no file is written

The dims of Kimi-K2 (hidden 7168, experts of 2048 of which a token takes 8, 64 heads, latents of 512 + 64), random codes, and few of
its layers and experts: a layer's 384 experts take 17 GB in FP8. Those that a token does not take cost memory alone, so that time and
bytes per token are those of as many layers with all experts. The vocabulary is cut so that the head is as large a part of these layers
as it is of the whole model. The contestants:

    FP8              as Kimi-K2 was released: all but head, embedding, router and norms in FP8
    INT4             as Kimi-K2-Thinking was: the routed experts in INT4, everything else in bf16
    INT4 throughout  as ``deepseek-moe convert to-4bit --head 4bit`` makes it: all that is FP8 in the first, and the head

The second has half the bytes of the first, and reads as many for a token: what the experts save, attention and shared experts in bf16 take.

``resident`` is what the kernel counts of the process beyond what it held before a model was loaded, after a prompt that touches
every expert; ``resident_experts`` the pages of the addresses that the experts' layers compute from (/proc/self/pagemap). The models
decode in turns. The share is of what the best of several readers gets from memory in the same rounds. Each is saved elsewhere, and
all tensors are compared with the release's byte by byte.
"""

import argparse
import ctypes
import gc
import json
import math
import mmap
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import common
import numpy
import torch
from cpu_readers import Readers, race
from decode import filled_caches
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointReader, parameter_breakdown, write_checkpoint
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.formats import FP8, INT4, WeightFormat
from modeling_deepseek_moe.weights import release_tensors

LAYERS, EXPERTS = 61, 384  # of the released model
CONFIG = {
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,  # one layer of 61 is dense: of a few, none
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
TINY = CONFIG | {"hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2, "q_lora_rank": 128}
VOCABULARY = 163840
IN_BF16 = ("self_attn", "shared_experts")
CONTESTANTS: dict[str, tuple[WeightFormat, tuple[str, ...]]] = {
    "FP8": (FP8, ()),
    # of Kimi-K2-Thinking's `ignore`, what this model has
    "INT4": (INT4, ("lm_head", *(f"re:.*{part}.*" for part in IN_BF16))),
    "INT4 throughout": (INT4, ()),
}
CONTEXT, PROMPT = 128, 1024  # a prompt of which every expert gets some tokens
TOKENS = 4  # of a sample
EMBEDDING = 4.0  # compared with what a layer adds to the residual stream: tokens differ, and so do their experts
SCALE = 2e-3
POOL = 256 << 20  # random bytes, from which every matrix takes its own


def config_of(options: argparse.Namespace, quantization: dict) -> dsm.KimiK2Config:
    sizes = {
        "n_routed_experts": options.experts,
        "num_hidden_layers": options.layers,
        "vocab_size": VOCABULARY * options.layers // LAYERS // 128 * 128,
    }
    fields = TINY if options.quick else CONFIG
    return dsm.KimiK2Config(**fields, **sizes, dtype="bfloat16", quantization_config=quantization)


def write_release(folder: Path, config: dsm.KimiK2Config, form: WeightFormat, ignored: tuple[str, ...]) -> None:
    """Codes of random bits where the release has codes, else random numbers in bf16."""
    in_bf16 = IN_BF16 if ignored else ()
    pool = numpy.frombuffer(numpy.random.Generator(numpy.random.SFC64(0)).bytes(POOL), numpy.uint8)
    # in FP8 without bit 5: no exponent is all ones, so numbers are finite, and at most 30
    pool, places = torch.from_numpy(pool & (0xDF if form is FP8 else 0xFF)), numpy.random.default_rng(0)

    def codes(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        start = int(places.integers(0, (POOL - size) // 8)) * 8
        return pool[start : start + size].view(dtype).view(shape)

    def floats(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        deviation = EMBEDDING if "embed_tokens" in name else 0.02
        return torch.empty(shape, dtype=torch.bfloat16).normal_(
            0, deviation, generator=torch.Generator().manual_seed(0)
        )

    plans = []
    for name, spec in release_tensors(config).items():
        shape = spec.shape
        if name.endswith("e_score_correction_bias"):
            plans.append(TensorPlan.of(name, torch.zeros(shape)))
        elif not spec.quantized or any(part in name for part in in_bf16):
            plans.append(TensorPlan(name, torch.bfloat16, shape, lambda name=name, shape=shape: floats(name, shape)))
        else:
            (coded, kind), (scales, scale_kind) = form.on_disk(name, shape).items()
            size = math.prod(kind[1]) * kind[0].itemsize
            if size > POOL:
                raise SystemExit(
                    f"{coded}: found {size:,} bytes of codes, wanted {POOL:,} at most: fewer --layers make a smaller head"
                )
            plans.append(TensorPlan(coded, *kind, lambda kind=kind: codes(*kind)))
            plans.append(TensorPlan.of(scales, torch.full(scale_kind[1], SCALE, dtype=scale_kind[0])))
            plans += [TensorPlan.of(name + suffix, make(shape)) for suffix, make in form.others.items()]
    fields = json.loads(config.to_json_string()) | {"architectures": ["DeepseekV3ForCausalLM"]}
    write_checkpoint(folder, plans, texts={"config.json": json.dumps(fields)}, show_progress=False)


def resident() -> int:
    """Bytes of this process in memory, pages of mapped files included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what a prompt took and gave back
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:", "RssShmem:"))


def resident_at(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of this process's pages in memory that hold the tensors."""
    size, found = mmap.PAGESIZE, set()
    with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
        for tensor in tensors:
            first, last = tensor.data_ptr() // size, -(-(tensor.data_ptr() + tensor.nbytes) // size)
            stream.seek(8 * first)
            entries = numpy.frombuffer(stream.read(8 * (last - first)), numpy.uint64)
            found.update((first + numpy.flatnonzero(entries >> numpy.uint64(63))).tolist())
    return size * len(found)


def matrices(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Codes and scales of all routed experts."""
    for layer in model.model.layers:
        for index in range(layer.mlp.experts.num_experts):
            for matrix in layer.mlp.experts.matrices(index).values():
                yield from matrix


@torch.no_grad()
def load(folder: Path) -> tuple[torch.nn.Module, dict]:
    """A model whose pages are all in memory, and what they take."""
    before, start = resident(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    seconds, breakdown = time.perf_counter() - start, parameter_breakdown(model.config)
    model(torch.randint(0, model.config.vocab_size, (1, PROMPT)), use_cache=False, logits_to_keep=1)
    row = {
        "load_s": seconds,
        "parameters": breakdown.parameters,
        "resident": resident() - before,
        "expert_parameters": breakdown.stored["routed experts"].parameters,
        "resident_experts": resident_at(matrices(model)),
        "bytes_per_token": bytes_per_token(folder, model.config) + int(breakdown.cache_bytes(CONTEXT)),
    }
    row["resident_per_parameter"] = row["resident"] / row["parameters"]
    row["resident_per_expert_parameter"] = row["resident_experts"] / row["expert_parameters"]
    return model, row


def bytes_per_token(folder: Path, config: dsm.KimiK2Config) -> int:
    """Of the release's tensors: all but the embedding, and of the routed experts those that a token takes."""
    reader, found = CheckpointReader.open(folder), 0
    for name in reader:
        if ".experts." in name:
            found += reader[name].nbytes * config.num_experts_per_tok / config.n_routed_experts
        elif "embed_tokens" not in name:
            found += reader[name].nbytes
    return int(found)


@torch.no_grad()
def tokens_of(model: torch.nn.Module, cache) -> None:
    for _ in range(TOKENS):
        model(torch.randint(0, model.config.vocab_size, (1, 1)), **{CACHE_NAME: cache}, logits_to_keep=1)


def speed(models: dict[str, torch.nn.Module], rows: dict[str, dict], rounds: int) -> None:
    """Fields of the rows: tokens per second, in turns."""
    runs = {name: partial(tokens_of, model, filled_caches(model.config, CONTEXT)[0]) for name, model in models.items()}
    times, bandwidth = race(runs, rounds, Readers(in_huge_pages=True))
    for name, row in rows.items():
        tokens_s = TOKENS / times[name].median
        share = tokens_s * row["bytes_per_token"] / bandwidth
        row |= {"tokens_s": tokens_s, "bandwidth": bandwidth, "share_of_bandwidth": share, **times[name].fields()}
    for row in rows.values():
        row["times_fp8"] = row["tokens_s"] / rows["FP8"]["tokens_s"]
        row["bytes_of_fp8"] = row["bytes_per_token"] / rows["FP8"]["bytes_per_token"]


def save(model: torch.nn.Module, folder: Path) -> dict:
    """Which tensors of a release are others after it was loaded and saved."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        released, saved = (CheckpointReader.open(each) for each in (folder, temporary))
        others = sorted(released.keys() ^ saved.keys())
        others += [name for name in released.keys() & saved.keys() if not same(released, saved, name)]
        said = [json.loads((Path(each) / "config.json").read_text()) for each in (folder, temporary)]
    is_same = said[0]["quantization_config"] == said[1]["quantization_config"]
    return {
        "tensors": len(released),
        "other_tensors": len(others),
        "others": others[:16],
        "same_announcement": is_same,
    }


def same(released: CheckpointReader, saved: CheckpointReader, name: str) -> bool:
    headers = [(reader[name].dtype, reader[name].shape) for reader in (released, saved)]
    return headers[0] == headers[1] and torch.equal(*(raw(reader.tensor(name)) for reader in (released, saved)))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def show(rows: dict[str, dict], options: argparse.Namespace) -> None:
    quantities = {
        "resident_per_expert_parameter": "bytes resident a parameter, experts",
        "resident_per_parameter": "the same, all",
        "bytes_per_token": "bytes per token",
        "bytes_of_fp8": "of FP8's",
        "tokens_s": "tokens/s",
        "times_fp8": "times FP8's",
        "share_of_bandwidth": "share of the bandwidth",
        "tensors": "tensors saved",
        "other_tensors": "with other bytes than before",
    }
    table = Table(title=f"Kimi-K2's layers: {options.layers} of {LAYERS}, {options.experts} of {EXPERTS} experts")
    for column in ("", *rows):
        table.add_column(column, justify="right")
    for key, text in quantities.items():
        values = [row[key] for row in rows.values()]
        table.add_row(text, *(f"{value:.3f}" if isinstance(value, float) else f"{value:,}" for value in values))
    Console().print(table)
    print("Experts that a token does not take cost memory alone: time and bytes per token are those of all 384.")


def measure(options: argparse.Namespace) -> dict:
    models, rows = {}, {}
    for name, (form, ignored) in CONTESTANTS.items():
        folder = options.folder / name.replace(" ", "-")
        config = config_of(options, form.quantization_config(ignored, with_head=False))
        if not (folder / "config.json").exists():
            write_release(folder, config, form, ignored)
        models[name], rows[name] = load(folder)
    speed(models, rows, options.rounds)
    for name, model in models.items():
        rows[name] |= save(model, options.folder / name.replace(" ", "-"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the releases are, or are written and kept")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=48, help="of a layer")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds, and no result file")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 3
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        rows = measure(options)
    show(rows, options)
    if not options.quick:
        sizes = {"layers": options.layers, "experts": options.experts, "context": CONTEXT}
        print("written to", common.save("kimi", {"config": CONFIG | sizes, "rows": rows, "at": time.strftime("%F")}))


if __name__ == "__main__":
    main()
