"""The figures of `cpu.py` as tables in the terminal, and held against what the engine is to reach; `figures.py` draws them."""

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "ms": ("ms", "{:.3g}"),
    "min_ms": ("least", "{:.3g}"),
    "spread": ("spread", "{:.0%}"),
    "disturbed": ("disturbed", "{}"),
    "us_a_call": ("µs a call", "{:.4g}"),
    "gb_s": ("GB/s", "{:.1f}"),
    "share_of_read": ("of reading", "{:.0%}"),
    "gflop_s": ("GFLOP/s", "{:.0f}"),
    "tokens_s": ("tokens/s", "{:.3g}"),
    "ratio": ("ratio", "{:.2f}×"),
}


def show(part: str, found: dict) -> None:
    console = Console(width=140)
    rows = found["rows"]
    table = Table(title=f"{part}: {found['machine']['cpu']}, {found['at']}")
    table.add_column("", no_wrap=True)
    table.add_column("threads", justify="right")
    table.add_column("", no_wrap=True)
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right")
    last = None
    for row in rows:
        case = (row["case"], row["threads"])
        if case != last and last is not None:
            table.add_section()
        head = (row["case"], str(row["threads"])) if case != last else ("", "")
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "" for name in columns]
        if "disturbed" in columns:
            cells[columns.index("disturbed")] += f"/{row['samples']}" if "samples" in row else ""
        table.add_row(*head, row["contestant"], *cells)
        last = case
    console.print(table)
    for name in ("errors", "agreement", "notes"):
        for line in found.get(name, ()):
            if isinstance(line, dict):
                line = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
            console.print(f"{name}: {line}")


BEST = "the best instruction set"  # that this machine has: the last one measured
# part, what the case begins with, contestant, field, limit; a limit that is negative is an upper one
GOALS = (
    ("ops", "FP8 linear 4096×7168, 1 row", BEST, "share_of_read", 0.95),
    ("ops", "FP8 linear 4096×7168, 1 row", "avx2", "share_of_read", 0.65),
    ("ops", "FP8 linear 4096×7168, 1 row", BEST, "ratio", 3.0),
    ("ops", "FP8 linear 4096×7168, 4 rows", BEST, "ratio", 1.8),
    ("ops", "FP8 linear 4096×7168, 512 rows", BEST, "ratio", 1 / 1.05),
    ("experts", "64 experts 2048×1408, top-6, 1 token", BEST, "ratio", 3.5),
    ("experts", "64 experts 2048×1408, top-8, 1 token", BEST, "ratio", 3.5),
    ("experts", "64 experts 64×32", BEST, "us_a_call", -40.0),
    ("experts", "64 experts 2048×1408, top-6, 512 tokens", BEST, "ratio", 1.0),
    ("experts", "64 experts 2048×1408, top-8, 512 tokens", BEST, "ratio", 1.0),
    ("e2e", "decoding at 128", "this package", "ratio", 4.5),
    ("e2e", "decoding at 128", "this package", "share_of_read", 0.8),
    ("e2e", "decoding at 8192", "this package", "ratio", 22.0),
    ("e2e", "prefill of 512 tokens", "this package", "ratio", 1.0),
    ("e2e", "next to llama.cpp, 128", "this package", "ratio", 1.0),
    ("e2e", "next to llama.cpp, 8192", "this package", "ratio", 2.0),
    # of tokens/s, with FP8's where both heads are quantised
    ("e2e_four_bit", "decoding at 128", "INT4, head INT4", "ratio", 1.5),
    ("e2e_four_bit", "decoding at 128", "NF4, head NF4", "ratio", 1.5),
    ("e2e_four_bit", "decoding at 128", "INT4, head INT4", "share_of_read", 0.75),
    ("e2e_four_bit", "decoding at 128", "NF4, head NF4", "share_of_read", 0.75),
    ("e2e_four_bit", "prefill of 512 tokens", "INT4, head INT4", "ratio", 0.9),
    ("e2e_four_bit", "prefill of 512 tokens", "NF4, head NF4", "ratio", 0.9),
    ("e2e_four_bit", "next to llama.cpp, 128", "FP8, head FP8", "ratio_to_file", 1.1),
    ("e2e_four_bit", "next to llama.cpp, 128", "INT4, head INT4", "ratio_to_file", 1.0),
    ("e2e_four_bit", "next to llama.cpp, 128", "NF4, head NF4", "ratio_to_file", 1.0),
    ("e2e_four_bit", "next to llama.cpp, 8192", "FP8, head FP8", "ratio_to_file", 1.6),
    ("e2e_four_bit", "next to llama.cpp, 8192", "INT4, head INT4", "ratio_to_file", 1.5),
    ("e2e_four_bit", "next to llama.cpp, 8192", "NF4, head NF4", "ratio_to_file", 1.5),
    ("e2e_four_bit", "decoding at 128", "FP8, head FP8", "share_of_read", 0.8),
    ("e2e_four_bit", "decoding at 8192", "FP8, head FP8", "share_of_read", 0.75),
)
WITH_AVX2 = {("e2e_four_bit", "decoding at 128", "ratio"): 1.3}  # which decodes codes by more instructions
FILES = {"FP8": "llama.cpp q8", "INT4": "llama.cpp q4", "NF4": "llama.cpp q4"}  # of as many bits


def with_files(rows: list[dict]) -> list[dict]:
    """``ratio_to_file``: of tokens/s, with the fastest of llama.cpp's files of as many bits in the same turns."""
    found = []
    for row in rows:
        peer = FILES.get(row["contestant"].partition(",")[0])
        speeds = [
            other["tokens_s"]
            for other in rows
            if peer and other["case"] == row["case"] and other["contestant"].lower().startswith(peer)
        ]
        found.append(row | {"ratio_to_file": row["tokens_s"] / max(speeds)} if speeds else row)
    return found


def judge(result: dict) -> None:
    """Print each goal, what was found with the most threads, and whether it is met."""
    console = Console(width=140)
    for part, case, contestant, field, limit in GOALS:
        rows = with_files(result.get(part, {}).get("rows", []))
        if "instruction set: avx2" in result.get(part, {}).get("notes", ()):
            limit = WITH_AVX2.get((part, case, field), limit)
        rows = [row for row in rows if row["case"].startswith(case) and field in row]
        if contestant == BEST and rows:
            contestant = rows[-1]["contestant"]
        rows = [row for row in rows if row["contestant"].endswith(contestant)]
        if not rows:
            continue
        found = max(rows, key=lambda row: row["threads"])[field]
        met = found >= limit if limit > 0 else found <= -limit
        sign = "≥" if limit > 0 else "≤"
        console.print(
            f"[{'green]met    ' if met else 'red]not met'}[/] {case}, {contestant}: {field} {found:.3g} {sign} {abs(limit):.3g}"
        )
