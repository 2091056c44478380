"""One decoded token on the latent cache: this package compared with plain transformers, same weights, same run.

    python benchmarks/decode.py [--contexts 512 2048 8192 16384] [--threads 1] [--rounds 3]

DeepSeek-V2-Lite's attention (hidden 2048, 16 heads, latent 512 + 64) in bf16, 4 layers; few and narrow experts and a
small vocabulary, so that the attention is what is measured. The caches are filled with random latents; each round
decodes one token with each model, in turn. The transient is the peak of resident memory above the level before the
step, in a fresh process per model and context.
"""

import argparse
import ctypes
import multiprocessing
import threading
import time

import common
import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME

CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 65536,
}


def build_pair():
    """This package's model and plain transformers', with the same bf16 weights."""
    torch.manual_seed(0)
    plain = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**CONFIG)).to(torch.bfloat16).eval()
    ours = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**CONFIG)).to(torch.bfloat16).eval()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def filled_caches(config, context: int) -> list[transformers.DynamicCache]:
    """Caches of the same random latents, for this package and for plain transformers.

    Rotary pairs lie next to each other as released; plain transformers moves them to two halves before it caches.
    """
    ours, plain = (transformers.DynamicCache(config=config) for _ in range(2))
    for layer in range(config.num_hidden_layers):
        c_kv = torch.randn(1, 1, context, config.kv_lora_rank, dtype=torch.bfloat16)
        k_pe = torch.randn(1, 1, context, config.qk_rope_head_dim, dtype=torch.bfloat16)
        ours.update(c_kv, k_pe, layer)
        plain.update(c_kv.clone(), torch.cat((k_pe[..., 0::2], k_pe[..., 1::2]), dim=-1), layer)
    return [ours, plain]


@torch.no_grad()
def step(model, cache, context: int) -> torch.Tensor:
    if cache.get_seq_length() > context:  # take the last round's token out again
        cache.crop(context - cache.get_seq_length())
    return model(torch.tensor([[5]]), **{CACHE_NAME: cache}, use_cache=True).logits


def transient(which: int, context: int, threads: int, queue) -> None:
    """Peak resident memory of one step above the level before it, in bytes (run in a process of its own)."""
    torch.set_num_threads(threads)
    model = build_pair()[which]
    cache = filled_caches(model.config, context)[which]
    step(model, filled_caches(model.config, 16)[which], 16)
    # memory that malloc holds free would hide what the step takes
    ctypes.CDLL(None).malloc_trim(0)
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(model, cache, context)
    done.set()
    watcher.join()
    queue.put(max(0, peak[0] - before))


def measure_transient(which: int, context: int, threads: int) -> int:
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=transient, args=(which, context, threads, queue))
    process.start()
    value = queue.get()
    process.join()
    return value


def measure(ours, plain, context: int, rounds: int, bandwidth: float) -> dict:
    """Medians of interleaved steps of both models at one context, and the share of the bandwidth limit reached."""
    caches = filled_caches(ours.config, context)
    logits = [step(model, cache, context) for model, cache in zip((ours, plain), caches, strict=True)]
    times = common.interleave(
        {
            "ours": lambda: step(ours, caches[0], context),
            "transformers": lambda: step(plain, caches[1], context),
        },
        rounds,
        warm_up=0,
    )
    mine, theirs = times["ours"].median, times["transformers"].median
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[0].layers)
    experts = ours.config.num_experts_per_tok / ours.config.n_routed_experts
    read = cache_bytes + sum(
        parameter.nbytes * (experts if ".experts." in name else 1)
        for name, parameter in ours.named_parameters()
        if "embed_tokens" not in name
    )
    return {
        "context": context,
        "ours_ms": mine * 1e3,
        "transformers_ms": theirs * 1e3,
        "ratio": theirs / mine,
        "share_of_bandwidth_limit": read / bandwidth / mine,
        "cache_bytes": cache_bytes,
        "logits_relative_difference": relative(*logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()

    ours, plain = build_pair()
    limits = {"read_bandwidth": common.read_bandwidth(), "bf16_gemm_flops": common.gemm_flops()}
    rows = []
    for context in options.contexts:
        row = measure(ours, plain, context, options.rounds, limits["read_bandwidth"])
        if not options.no_memory:
            for which, name in enumerate(("ours", "transformers")):
                row[f"{name}_transient_over_cache"] = (
                    measure_transient(which, context, options.threads) / row["cache_bytes"]
                )
        rows.append(row)
    show(rows)
    print(
        "written to",
        common.save(f"decode-{options.threads}-thread", {"config": CONFIG, "limits": limits, "rows": rows}),
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def show(rows: list[dict]) -> None:
    table = Table(title="One token, bf16, 4 layers, 16 heads")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
