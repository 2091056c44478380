"""Sparse attention (DeepSeek-V3.2) compared with this package's own dense latent attention and with plain transformers.

    python benchmarks/dsa.py                                    20 minutes on two cores, as much memory as there is
    python benchmarks/dsa.py --only decode --tokens 131072      some rows; others of the result file stay
    python benchmarks/dsa.py --only prefill --peaks             memory alone, which other programs do not disturb

V3.2's heads (128 of 128 + 64, latents of 512 + 64, an indexer of 64 heads of 128, top-k 2,048) over a hidden size of 1,024, few
layers, random weights in bf16. The contestants have the same weights: this package's `deepseek_v32`; its `deepseek_v3` without
the indexer, which attends to all keys; and transformers' `deepseek_v32`, as far as memory allows.

    prefill   one prompt, one layer
    decode    one token after a cache of random latents and keys, two layers; as `common.Timing` counts

Each figure is of a process of its own, which may take as much memory as is free: one that asks for more ends, and its row says
so. transformers' scores of all queries are [1, 64, S, S] in fp32: where they alone exceed that memory it is not begun. `peak` is the most memory during the measured call beyond what the process held before it (Linux).
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import common
import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cache import prepare_cache, update_indexer
from modeling_deepseek_moe.compat import CACHE_NAME

CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 163840,
}
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
SPARSE, DENSE, PLAIN = "sparse", "dense", "transformers"
TOKENS = {"prefill": (2048, 8192, 16384, 32768), "decode": (32768, 131072)}
LAYERS = {"prefill": 1, "decode": 2}
STEPS, FEWEST = 25, 2  # of decoding, after one that does not count; the latter of transformers, which takes seconds
SPARE = 1 << 30  # bytes of free memory that no contestant may take
DOES_NOT_FIT = "does not fit"


def build(contestant: str, layers: int) -> torch.nn.Module:
    """The same weights each time, of which a dense model has those that it knows."""
    config = CONFIG | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        sparse = dsm.DeepseekV32ForCausalLM(dsm.DeepseekV32Config(**config | INDEXER, num_nextn_predict_layers=0))
        if contestant == SPARSE:
            return sparse.eval()
        if contestant == DENSE:
            model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**config, num_nextn_predict_layers=0))
        else:
            model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**config | INDEXER))
    finally:
        torch.set_default_dtype(before)
    known = model.state_dict()
    model.load_state_dict({name: value for name, value in sparse.state_dict().items() if name in known})
    return model.eval()


def filled_cache(model, length: int) -> transformers.DynamicCache:
    """Of random latents and, where there are indexers, their keys."""
    cache = transformers.DynamicCache(config=model.config)
    with_indexer = hasattr(model.model.layers[0].self_attn, "indexer")
    if isinstance(model, dsm.DeepseekMoePreTrainedModel):
        prepare_cache(cache, model.config, 1)
    for layer in range(model.config.num_hidden_layers):
        parts = [
            torch.randn(1, length, CONFIG[name], dtype=torch.bfloat16) for name in ("kv_lora_rank", "qk_rope_head_dim")
        ]
        if with_indexer:
            update_indexer(cache, torch.randn(1, length, INDEXER["index_head_dim"], dtype=torch.bfloat16), layer)
        cache.update(*(part.unsqueeze(1) for part in parts), layer)
    return cache


def bytes_of_a_token(model, length: int) -> int:
    """That decoding a token reads at least: weights and, of the cache, what is attended to and the indexer's keys."""
    experts = CONFIG["num_experts_per_tok"] / CONFIG["n_routed_experts"]
    read = 0.0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            read += parameter.nbytes * (experts if ".experts." in name else 1)
    latent = 2 * (CONFIG["kv_lora_rank"] + CONFIG["qk_rope_head_dim"])
    if isinstance(model, dsm.DeepseekV32ForCausalLM):
        a_layer = length * 2 * INDEXER["index_head_dim"] + min(length, INDEXER["index_topk"]) * latent
    else:
        a_layer = length * latent
    return int(read) + model.config.num_hidden_layers * a_layer


class Peak:
    """The most bytes that this process holds, from now on, beyond what it holds now."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc holds free would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own mark starts again
        self.before = self._kilobytes("VmRSS")

    @staticmethod
    def _kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    @property
    def bytes(self) -> int:
        return max(0, self._kilobytes("VmHWM") - self.before) * 1024


@torch.no_grad()
def measure(what: str, contestant: str, tokens: int, room: int) -> dict:
    """In a process of its own, which may take ``room`` bytes more than it has."""
    model = build(contestant, LAYERS[what])
    ids = torch.randint(0, CONFIG["vocab_size"], (1, tokens))
    model(ids[:, :64], logits_to_keep=1)
    room += psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    if what == "prefill":
        peak = Peak()
        timing = common.interleave({what: lambda: model(ids, use_cache=True, logits_to_keep=1)}, 1, warm_up=0)[what]
        return timing.fields() | {"peak_mb": peak.bytes / 1e6}
    cache = filled_cache(model, tokens)
    token = torch.tensor([[5]])
    model(token, **{CACHE_NAME: cache})
    peak, rounds = Peak(), FEWEST if contestant == PLAIN else STEPS
    timing = common.interleave({what: lambda: model(token, **{CACHE_NAME: cache})}, rounds, warm_up=0)[what]
    return timing.fields() | {"peak_mb": peak.bytes / 1e6, "mb_read": bytes_of_a_token(model, tokens) / 1e6}


def scores_bytes(contestant: str, what: str, tokens: int) -> int:
    """Of the tensor that transformers' indexer makes of a prompt; its products with weights take as much again."""
    return 4 * INDEXER["index_n_heads"] * tokens**2 if (contestant, what) == (PLAIN, "prefill") else 0


def measure_apart(what: str, contestant: str, tokens: int, options: argparse.Namespace) -> dict:
    """`measure`'s figures, or why there are none."""
    row = {"what": what, "contestant": contestant, "tokens": tokens, "layers": LAYERS[what]}
    room = psutil.virtual_memory().available - SPARE if options.memory is None else int(options.memory * 1e9)
    scores = scores_bytes(contestant, what, tokens)
    if scores:
        row["scores_gb"] = scores / 1e9
    if scores > room:
        return row | {"note": f"{DOES_NOT_FIT} in {room / 1e9:.0f} GB: scores of {scores / 1e9:.0f} GB"}
    command = [sys.executable, __file__, "--threads", str(options.threads), "--memory", str(room / 1e9)]
    command += ["--measure", what, contestant, str(tokens)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=options.patience)
    except subprocess.TimeoutExpired:
        return row | {"note": f"more than {options.patience} s"}
    if done.returncode and "allocate memory" in done.stderr:
        return row | {"note": f"{DOES_NOT_FIT} in {room / 1e9:.0f} GB"}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if options.peaks:
        return row | {"peak_mb": found["peak_mb"], "threads_of_peak": options.threads}
    row |= found
    row["tokens/s"] = (tokens if what == "prefill" else 1) / row["ms"] * 1e3
    if "mb_read" in row:
        bandwidth = common.read_bandwidth()
        row |= {"share_of_bandwidth": row["mb_read"] / row["ms"] * 1e9 / bandwidth, "bandwidth_gb_s": bandwidth / 1e9}
    return row


def key(row: dict) -> tuple:
    return row["what"], row["tokens"], (SPARSE, DENSE, PLAIN).index(row["contestant"])


def add_ratios(rows: list[dict]) -> None:
    """How many times as long each contestant takes as sparse attention does, and how much more memory."""
    first = {key(row)[:2]: row for row in rows if row["contestant"] == SPARSE}
    for row in rows:
        sparse = first.get(key(row)[:2], {})
        if "ms" in row and "ms" in sparse:
            row["times_sparse"] = row["ms"] / sparse["ms"]


def show(rows: list[dict]) -> None:
    columns = (
        "what",
        "tokens",
        "contestant",
        "ms",
        "tokens/s",
        "peak_mb",
        "share_of_bandwidth",
        "times_sparse",
        "note",
    )
    table = Table(title="V3.2's heads, bf16")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=tuple(TOKENS))
    parser.add_argument("--tokens", type=int, nargs="+", help="of a prompt, or cached")
    parser.add_argument("--contestants", nargs="+", choices=(SPARSE, DENSE, PLAIN), default=(SPARSE, DENSE, PLAIN))
    parser.add_argument("--patience", type=int, default=900, help="seconds for one figure")
    parser.add_argument("--peaks", action="store_true", help="no times; those in the result file stay")
    parser.add_argument("--memory", type=float, help="GB that a figure may take")
    parser.add_argument("--name", default="dsa", help="of the result file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        what, contestant, tokens = options.measure
        print(json.dumps(measure(what, contestant, int(tokens), int(options.memory * 1e9))))
        return
    file = common.RESULTS / f"{options.name}.json"
    before = json.loads(file.read_text()) if file.exists() else {"rows": []}
    rows = {key(row): row for row in before["rows"]}
    kept = {"machine": before["machine"]} if options.peaks and rows else {}  # on which the times were measured
    for what in (options.only,) if options.only else TOKENS:
        for tokens in options.tokens or TOKENS[what]:
            for contestant in options.contestants:
                row = measure_apart(what, contestant, tokens, options)
                old = rows.get(key(row), {}) if options.peaks else {}
                rows[key(row)] = {name: value for name, value in old.items() if name != "note"} | row
                found = [rows[each] for each in sorted(rows)]
                add_ratios(found)
                common.save(options.name, kept | {"config": CONFIG | INDEXER, "rows": found})
    show(found)
    print("written to", file)


if __name__ == "__main__":
    main()
