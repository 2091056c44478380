"""The same experts streamed from the disk in FP8 and in INT4: bytes read per token, and tokens per second, in turns.

    python benchmarks/stream_four_bit.py [--folder FOLDER] [--v3] [--fp8 FOLDER --int4 FOLDER]

Without folders it writes 2.3 GB of random FP8 with two layers of 40 experts (25 MB each), and has ``deepseek-moe convert
to-4bit --format int4`` make its INT4 of it (14 MB an expert, scales included): 1.4 GB. Both are deleted in the end. The shape
has V3's routing at hidden size 4096, and about as many bytes of experts a token for one of everything else as V3 has. With
``--v3`` it has the dims of V3 itself, two layers of 64 experts of 44 MB: 6.5 and 4.7 GB.

Experts are read past the page cache, from which the files are dropped before each run. Every run is a process of its own, and is
given the same tokens and the same memory for experts. The budget is in bytes, so that INT4 has more experts in it: ``missed`` are
the bytes of experts that a token needed and memory had not, ``all`` those that it needed.
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
from load import write_random_release
from rich.console import Console
from rich.table import Table
from stream import CONFIG, EMBEDDING, GB, child, texts

import modeling_deepseek_moe as dsm

V3 = CONFIG | {"num_hidden_layers": 3}  # 2 of them of experts
NARROW = V3 | {
    "vocab_size": 4096,
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "n_routed_experts": 40,
    "q_lora_rank": 768,
}
BUDGETS = {False: "0.35,0.7", True: "1,2"}  # GB, of V3's dims or not: about a sixth and a third of the experts in FP8


def write_both(place: Path, config: dict) -> dict[str, Path]:
    folders = {"FP8": place / "fp8", "INT4": place / "int4"}
    write_random_release(folders["FP8"], dsm.DeepseekV3Config(**config), EMBEDDING, "4GB")
    code = "from modeling_deepseek_moe.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", "to-4bit", *map(str, folders.values()), "--format", "int4"]
    subprocess.run([*command, "--keep-fp8", "attention,dense,shared"], check=True)
    return folders


def measure(folders: dict[str, Path], budgets: list[int], rounds: int, place: Path) -> list[dict]:
    vocabulary = dsm.read_config(folders["FP8"]).vocab_size
    settings = {name: {"runs": texts(vocabulary), "logits": str(place / f"{name}.pt")} for name in folders}
    for name, folder in folders.items():
        child("mapped", folder, **settings[name])
    rows = []
    for _ in range(rounds):
        for budget in budgets:
            for name, folder in folders.items():
                row = child("streamed", folder, budget=budget, ahead=True, **settings[name])
                rows.append(figures(name, row))
                print(rows[-1], flush=True)
    return rows


def figures(name: str, row: dict) -> dict:
    decode = row["decode"]
    return {
        "weights": name,
        "budget": row["budget"],
        "tokens_per_s": decode["tokens_per_s"],
        "bytes_per_token": decode["bytes_read"] / decode["tokens"],
        "missed_per_token": decode["bytes_missed"] / decode["tokens"],
        "needed_per_token": decode["bytes_missed"] / decode["tokens"] / (1 - decode["hit_rate"]),
        "hit_rate": decode["hit_rate"],
        "share_of_limit": decode["share_of_limit"],
        "disk_bytes_per_s": row["disk_bytes_per_s"],
        "stall_share": decode["stall_seconds"] / decode["seconds"],
        "bit_equal": row["bit_equal"],
    }


def summarise(rows: list[dict]) -> list[dict]:
    """Medians of the rounds, and INT4 over FP8 where the budget is the same."""
    found = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        medians = {}
        for name in ("FP8", "INT4"):
            same = [row for row in rows if (row["weights"], row["budget"]) == (name, budget)]
            numbers = [key for key, value in same[0].items() if isinstance(value, float)]
            medians[name] = {key: statistics.median(row[key] for row in same) for key in numbers}
            found.append(
                {
                    "weights": name,
                    "budget": budget,
                    **medians[name],
                    "bit_equal": all(row["bit_equal"] for row in same),
                }
            )
        ratios = {
            key: medians["INT4"][key] / medians["FP8"][key]
            for key in ("tokens_per_s", "bytes_per_token", "needed_per_token")
        }
        found[-1] |= {f"{key}_over_fp8": ratio for key, ratio in ratios.items()}
    return found


def report(medians: list[dict]) -> None:
    table = Table(title="experts streamed from the disk")
    for column in (
        "",
        "GB",
        "tok/s",
        "MB per token",
        "all MB",
        "hit",
        "limit",
        "disk GB/s",
        "tok/s ÷ FP8",
        "bytes ÷ FP8",
    ):
        table.add_column(column, justify="right")
    for row in medians:
        ratios = [
            f"{row[key]:.2f}" if key in row else "" for key in ("tokens_per_s_over_fp8", "bytes_per_token_over_fp8")
        ]
        table.add_row(
            row["weights"],
            f"{row['budget'] / GB:.1f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['bytes_per_token'] / 1e6:.0f}",
            f"{row['needed_per_token'] / 1e6:.0f}",
            f"{row['hit_rate']:.0%}",
            f"{row['share_of_limit']:.0%}",
            f"{row['disk_bytes_per_s'] / GB:.2f}",
            *ratios,
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a folder in it is made and deleted")
    parser.add_argument("--fp8", type=Path, help="a release in FP8, in place of one that is written")
    parser.add_argument("--int4", type=Path, help="its INT4")
    parser.add_argument("--v3", action="store_true", help="V3's own dims: 11 GB of disk")
    parser.add_argument(
        "--budgets", help=f"GB of memory for experts, by default {BUDGETS[False]}, of V3's {BUDGETS[True]}"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path, help="only write the two releases here, and keep them")
    parser.add_argument("--name", default="stream-four-bit", help="of the results file")
    options = parser.parse_args()
    if (options.fp8 is None) != (options.int4 is None):
        parser.error("--fp8 and --int4 go together")
    config = V3 if options.v3 else NARROW
    if options.write:
        write_both(options.write, config)
        return
    budgets = [int(float(text) * GB) for text in (options.budgets or BUDGETS[options.v3]).split(",")]
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        place = Path(temporary)
        folders = {"FP8": options.fp8, "INT4": options.int4} if options.fp8 else write_both(place, config)
        rows = measure(folders, budgets, options.rounds, place)
        shape = json.loads((folders["FP8"] / "config.json").read_text())
        sizes = {
            name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in folders.items()
        }
    medians = summarise(rows)
    report(medians)
    result = {"medians": medians, "rows": rows, "file_bytes": sizes, "config": shape, "at": time.strftime("%F")}
    print("written to", common.save(options.name, result))


if __name__ == "__main__":
    main()
