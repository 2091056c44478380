"""The figures of `cpu.py` as tables in the terminal, and as a plot."""

from pathlib import Path

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
)


def judge(result: dict) -> None:
    """Print each goal, what was found with the most threads, and whether it is met."""
    console = Console(width=140)
    for part, case, contestant, field, limit in GOALS:
        rows = [row for row in result.get(part, {}).get("rows", ()) if row["case"].startswith(case) and field in row]
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


def plot(result: dict, file: Path) -> Path | None:
    """Bars for each part; ``None`` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for part, unit in (("ops", "gb_s"), ("experts", "ms"), ("mla", "ms"), ("e2e", "tokens_s")):
        rows = result.get(part, {}).get("rows", [])
        most = max((row["threads"] for row in rows), default=0)
        for case in dict.fromkeys(row["case"] for row in rows if row["threads"] == most and unit in row):
            panels.append((case, unit, [row for row in rows if row["case"] == case and row["threads"] == most]))
    if not panels:
        return None
    across = 3
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5.2 * across, 2.3 * down), squeeze=False)
    for axis, (case, unit, rows) in zip(axes.flat, panels, strict=False):
        rows = [row for row in rows if unit in row][::-1]
        colours = [
            "#4c78a8"
            if "torch" in r["contestant"] or "transformers" in r["contestant"]
            else "#bab0ac"
            if r["contestant"].startswith("read")
            else "#f58518"
            for r in rows
        ]
        bars = axis.barh([row["contestant"] for row in rows], [row[unit] for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axis.set_title(f"{case} ({COLUMNS[unit][0]})", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    machine = next(iter(result.values()))["machine"]
    figure.suptitle(f"{machine['cpu']}, {most} threads, torch {machine['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file
