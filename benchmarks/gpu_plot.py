"""The charts of `gpu.py`: what its parts wrote, drawn as SVG. Parts that are missing or failed are left out."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from drawing import Bar, Grid, draw


def charts(results: Sequence[dict]) -> dict[str, Grid]:
    """By file name."""
    parts = {result["part"]: result for result in results if "error" not in result}
    card = parts.get("machine", {}).get("card", "a GPU")
    found = {
        "experts": _experts(parts.get("decode_experts"), parts.get("limits"), card),
        "tokens": _tokens(parts.get("end_to_end"), parts.get("plain_transformers"), card),
        "hybrid": _hybrid(parts.get("hybrid"), card),
    }
    return {name: grid for name, grid in found.items() if grid is not None}


def write(results: Sequence[dict], folder: Path) -> list[Path]:
    """A file for each chart."""
    files = []
    for name, grid in charts(results).items():
        files.append(folder / f"{name}.svg")
        files[-1].write_text(draw(grid))
    return files


def _experts(part: dict | None, limits: dict | None, card: str) -> Grid | None:
    if part is None:
        return None
    shapes, few = dict.fromkeys(row["shape"] for row in part["rows"]), (1, 16)
    read, cells = (limits or {}).get("read_TBps"), {}
    for row in part["rows"]:
        if row["tokens"] in few:
            remark = f"{row['GBps'] / 10 / read:.0f} % of a read" if read else ""
            bar = Bar(row["format"], row["GBps"], "ours", f"{row['GBps']:,.0f} GB/s", remark)
            cells[row["shape"], _tokens_of(row["tokens"])] = (
                *cells.get((row["shape"], _tokens_of(row["tokens"])), ()),
                bar,
            )
    columns = tuple(dict.fromkeys(column for _, column in cells))
    return Grid(f"Routed experts of few tokens on {card}", "bytes of weights a second", columns, tuple(shapes), cells)


def _tokens_of(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def _tokens(ours: dict | None, plain: dict | None, card: str) -> Grid | None:
    if ours is None:
        return None
    named = {"FP8": (ours["fp8"], "ours"), "bf16": (ours["bf16"], "ours")}
    if plain is not None:
        named["transformers, bf16"] = (plain["bf16"], "other")
    cells: dict[tuple[str, str], tuple[Bar, ...]] = {}
    for name, (runs, kind) in named.items():
        for row in runs["rows"]:
            key = f"{row['batch']} × {row['context']:,} tokens", "tokens per second"
            cells[key] = (*cells.get(key, ()), Bar(name, row["tokens_per_s"], kind, f"{row['tokens_per_s']:,.0f}"))
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    return Grid(
        f"V2-Lite's dimensions on {card}", "decoding, by batch and context", ("tokens per second",), rows, cells
    )


def _hybrid(part: dict | None, card: str) -> Grid | None:
    if part is None:
        return None
    cells = {}
    for row in part["rows"]:
        measured = Bar(
            "measured", row["tokens_per_s"], "ours", f"{row['tokens_per_s']:,.1f}", f"{row['of_predicted']:.0%}"
        )
        told = Bar("predicted", row["predicted_tokens_per_s"], "other", f"{row['predicted_tokens_per_s']:,.1f}")
        cells[f"{row['held_share']:.0%} of the experts", "tokens per second"] = measured, told
    rows = tuple(row for row, _ in cells)
    title = f"Experts in main memory and on {card}"
    return Grid(title, f"{part['layers']} layers of V2-Lite in FP8", ("tokens per second",), rows, cells)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for path in write([json.loads(file.read_text()) for file in sorted(place.glob("*.json"))], place):
        print(path)
