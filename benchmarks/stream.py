"""Experts of a checkpoint larger than memory: tokens per second compared with what the disk allows, and with accelerate.

    python benchmarks/stream.py [--folder FOLDER] [--without-peer]

Writes 13 GB of random FP8 in DeepSeek-V3's shapes (hidden 7168, 128 heads, experts of width 2048: 44 MB each; 64 of them
in each of 4 layers, 8 per token), and deletes them in the end. It reads about 2 GB per second for ten minutes. Every contestant
runs in a process of its own and is given the same tokens.

The budget limits memory: experts are read past the page cache, and what the page cache holds of the files after a run
(``in_page_cache``) is measured next to the private memory of the process; together they are less than half the files. The
limit is what a plain loop of direct reads of blocks of an expert's size gets from the same files, by one thread or by two,
whichever is faster, between the tokens that are timed.

Random weights say nothing about real routing: neither how often experts come again, nor how often the next layer's
router can be foreseen. Hit rates here are those of a router that prefers no one.

The peer is transformers' own DeepseekV3 with its layers on the disk, by accelerate, on bf16 copies of the same weights: on
a CPU it cannot run FP8. Its files are dropped from the page cache before every token, as memory of half their size would
have it: it reads all of them, in a circle. It has 2 layers of experts, for the disk's sake, and so has the streamed run
next to it. With the 256 experts of DeepSeek-V3 the peer, which reads all of a layer's, would take four times as long, and
no one else would.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from load import write_random_release
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointReader, write_checkpoint
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.formats import FP8

CONFIG = {
    "vocab_size": 16384,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 5,
    "num_attention_heads": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 4,
    "num_nextn_predict_layers": 0,
}
PEER_LAYERS = 3  # 2 of them of experts
GB = 1_000_000_000
# budgets, and whether to read ahead
RUNS = ((1 * GB, True), (2 * GB, True), (3 * GB, True), (3 * GB, False))
EXPERT_BYTES = 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
EMBEDDING = 4.0  # compared with what a layer adds to the residual stream, about 1
DECODED, WARM_UP, SAME_PROMPT = 16, 12, 3  # tokens
PEER_TOKENS = 3


def child(contestant: str, folder: Path, **settings) -> dict:
    script = Path(__file__).with_name("stream_contestants.py")
    command = [sys.executable, str(script), contestant, str(folder), json.dumps(settings)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise SystemExit(f"{contestant}: {out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def texts(vocabulary: int = CONFIG["vocab_size"]) -> list:
    """Tokens, and how many of them are a prompt: to fill the memory, the same prompt twice, what is timed."""
    generator = torch.Generator().manual_seed(1)

    def draw(count):
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    same = draw(SAME_PROMPT)
    return [[draw(WARM_UP), 1], [same, SAME_PROMPT], [same, SAME_PROMPT], [draw(1 + DECODED), 1]]


def measure_streaming(folder: Path, logits: Path, rounds: int) -> dict:
    """Mapped for reference, then every one of `RUNS`, in turns."""
    settings = {"runs": texts(), "logits": str(logits)}
    reference = child("mapped", folder, **settings)
    rows = []
    for _ in range(rounds):
        for budget, ahead in RUNS:
            rows.append(child("streamed", folder, budget=budget, ahead=ahead, **settings))
            show(rows[-1])
    return {"mapped": reference, "rows": rows}


def show(row: dict) -> None:
    decode = row["decode"]
    print(
        f"{row['budget'] / GB:.1f} GB, ahead {row['ahead']}: {decode['tokens_per_s']:.2f} tokens/s, "
        f"{decode['share_of_limit']:.0%} of the limit of {row['disk_bytes_per_s'] / GB:.2f} GB/s, "
        f"{decode['computing_s'] / decode['seconds']:.0%} not waiting, same bits {row['bit_equal']}",
        flush=True,
    )


def measure_peer(place: Path) -> dict:
    """The same weights twice: FP8 here, bf16 for accelerate."""
    folder = place / "fp8"
    size = write_random_release(
        folder, dsm.DeepseekV3Config(**CONFIG | {"num_hidden_layers": PEER_LAYERS}), EMBEDDING, "4GB"
    )
    settings = {"runs": texts(), "logits": str(place / "logits.pt")}
    child("mapped", folder, **settings)
    budget = CONFIG["n_routed_experts"] * 2 // 10 * EXPERT_BYTES  # a tenth of the experts
    ours = [child("streamed", folder, budget=budget, ahead=True, **settings) for _ in range(3)]
    write_bf16(folder, place / "bf16")
    offload = place / "offload"
    peer = child("accelerate", place / "bf16", ids=texts()[-1][0], tokens=PEER_TOKENS, offload=str(offload))
    rate = statistics.median(run["decode"]["tokens_per_s"] for run in ours)
    return {"fp8_bytes": size, "ours": ours, "accelerate": peer, "times_faster": rate * peer["median_token_s"]}


def write_bf16(source: Path, target: Path) -> None:
    """The release with its FP8 multiplied out, a tensor at a time."""
    reader = CheckpointReader.open(source)

    def produce(name: str) -> torch.Tensor:
        found = reader.tensor(name)
        scale = name + FP8.scale_suffix
        return FP8.dequantize(found, reader.tensor(scale), torch.bfloat16) if scale in reader else found

    plans = []
    for name, info in reader.items():
        if not name.endswith(FP8.scale_suffix):
            dtype = torch.bfloat16 if info.dtype == FP8.code_dtype else info.dtype
            plans.append(TensorPlan(name, dtype, info.shape, lambda name=name: produce(name)))
    fields = json.loads((source / "config.json").read_text())
    del fields["quantization_config"]
    write_checkpoint(
        target, plans, max_shard_size="4GB", texts={"config.json": json.dumps(fields)}, show_progress=False
    )


def summarise(rows: list[dict]) -> list[dict]:
    """Medians of the rounds, for every budget and way of reading."""
    found = []
    for budget, ahead in dict.fromkeys((row["budget"], row["ahead"]) for row in rows):
        same = [row for row in rows if (row["budget"], row["ahead"]) == (budget, ahead)]
        fields = {
            "tokens_per_s": lambda row: row["decode"]["tokens_per_s"],
            "share_of_limit": lambda row: row["decode"]["share_of_limit"],
            "hit_rate": lambda row: row["decode"]["hit_rate"],
            "read_over_missed": lambda row: row["decode"]["read_over_missed"],
            "stall_share": lambda row: row["decode"]["stall_seconds"] / row["decode"]["seconds"],
            "prefetch_accuracy": lambda row: row["decode"]["prefetch_accuracy"] or 0.0,
            "disk_bytes_per_s": lambda row: row["disk_bytes_per_s"],
            "first_prompt_s": lambda row: row["first"]["seconds"],
            "second_prompt_s": lambda row: row["second"]["seconds"],
            "memory_over_files": lambda row: row["memory_over_files"],
        }
        medians = {name: statistics.median(map(of, same)) for name, of in fields.items()}
        found.append({"budget": budget, "ahead": ahead, "bit_equal": all(row["bit_equal"] for row in same), **medians})
    return found


def report(result: dict) -> None:
    table = Table(title=f"{result['file_bytes'] / GB:.1f} GB of files, random FP8 in DeepSeek-V3's shapes")
    for column in ("GB", "ahead", "tok/s", "limit", "hit", "read/missed", "stall", "disk", "again", "bits"):
        table.add_column(column, justify="right")
    for row in result["medians"]:
        table.add_row(
            f"{row['budget'] / GB:.0f}",
            f"{row['prefetch_accuracy']:.0%}" if row["ahead"] else "no",
            f"{row['tokens_per_s']:.2f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['hit_rate']:.0%}",
            f"{row['read_over_missed']:.3f}",
            f"{row['stall_share']:.0%}",
            f"{row['disk_bytes_per_s'] / GB:.2f}",
            f"{row['first_prompt_s'] / row['second_prompt_s']:.1f}×",
            "same" if row["bit_equal"] else "DIFFERENT",
        )
    Console().print(table)
    if "peer" in result:
        peer = result["peer"]
        print(
            f"accelerate: {peer['accelerate']['median_token_s']:.1f} s a token, {peer['times_faster']:.1f} times ours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a folder in it is made and deleted")
    parser.add_argument("--keep", type=Path, help="write the large checkpoint here, or find it here, and keep it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true", help="do not run accelerate: 32 GB less to write")
    parser.add_argument("--name", default="stream-v3", help="of the results file")
    options = parser.parse_args()
    result = {"config": CONFIG, "at": time.strftime("%F")}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.keep or Path(temporary, "release")
        if not (folder / "config.json").exists():
            write_random_release(folder, dsm.DeepseekV3Config(**CONFIG), EMBEDDING, "4GB")
        result["file_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        result |= measure_streaming(folder, Path(temporary, "logits.pt"), options.rounds)
    result = {"medians": summarise(result["rows"]), **result}
    if not options.without_peer:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            result["peer"] = measure_peer(Path(temporary))
    report(result)
    print("written to", common.save(options.name, result))


if __name__ == "__main__":
    main()
