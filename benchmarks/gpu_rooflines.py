"""What the kernels' instructions allow of a card, from `tests/gpu/aot_*.json` and data sheets: the table of docs/gpu.md.

    python benchmarks/gpu_rooflines.py     writes it again

A processor of a card starts four warps' instructions a clock, 128 lanes: ``processors · 128 · clock`` lane instructions a second.
A kernel that takes ``n`` of them for a byte cannot read faster than that over ``n``: as a share of the card's bandwidth that is
what the instructions allow at most. On SM80, SM89 and SM90 integers, and on SM80 floats, have half of the lanes: half of it is
what they allow at least, whatever the mix is. SM120 has all lanes for both.

Products of many rows are a matter of the tensor cores: there the share is that of their rate, with the clocks that a step's
instructions take to be started over those its products take.
"""

import json
from pathlib import Path
from typing import NamedTuple

from modeling_deepseek_moe.ops import _triton_table

ROOT = Path(__file__).resolve().parents[1]
PAGE, TABLES = ROOT / "docs" / "gpu.md", ROOT / "tests" / "gpu"
BEGIN, END = "<!-- benchmarks/gpu_rooflines.py -->", "<!-- end -->"
LANES = 128  # that a processor starts an instruction for in a clock


class Card(NamedTuple):
    """From data sheets: ``processors``, boost ``clock`` in GHz, ``bandwidth`` in TB/s; dense TFLOP/s in bf16 and FP8, with sums in fp32.

    ``least``: the share of its lanes that all instructions have.
    """

    name: str
    sm: int
    processors: int
    clock: float
    bandwidth: float
    bf16: float
    fp8: float
    least: float

    def of_bandwidth(self, per_byte: float) -> tuple[float, float]:
        """At least, at most."""
        most = self.processors * LANES * self.clock * 1e9 / (per_byte * self.bandwidth * 1e12)
        return min(1.0, self.least * most), min(1.0, most)

    def of_tensor_cores(self, instructions: float, operations: float, rate: float) -> tuple[float, float]:
        """At least, at most, of a step of these lane instructions and floating-point operations."""
        most = operations / (rate * 1e12) / (instructions / (self.processors * LANES * self.clock * 1e9))
        return min(1.0, self.least * most), min(1.0, most)


CARDS = (
    Card("A100", 80, 108, 1.41, 2.04, 312, 312, 0.5),
    Card("RTX 4090", 89, 128, 2.52, 1.01, 165, 330, 0.5),
    Card("H100", 90, 132, 1.83, 3.35, 989, 1979, 0.5),
    Card("RTX 5090", 120, 170, 2.41, 1.79, 210, 419, 1.0),
)


class Row(NamedTuple):
    """``tiles``: of a product of many rows, its row in the table of tiles."""

    title: str
    file: str
    kernel: str
    tiles: str | None = None

    @property
    def is_outer(self) -> bool:
        return self.tiles is not None and self.tiles.endswith("outer")


ROWS = (
    *(
        Row(f"experts in {title}, {part}", "experts", f"{kernel} {form} slots")
        for form, title in (
            ("fp8", "FP8"),
            ("bf16", "bf16"),
            ("int4", "INT4"),
            ("nf4", "NF4"),
            ("mxfp4", "MXFP4"),
        )
        for kernel, part in (("gate_up", "gate and up"), ("down", "down"))
    ),
    Row("linear layers in FP8", "block_fp8", "few_rows 1 x 7168"),
    Row("linear layers in FP8, 16 rows", "block_fp8", "few_rows 16 x 7168"),
    Row("linear layers in FP8, 64 rows", "block_fp8", "few_rows 64 x 7168"),
    Row("SwiGLU in FP8, gate and up", "block_fp8", "gate_up 1 x 2048"),
    Row("linear layers in INT4", "small", "few_rows int4 1"),
    Row("linear layers in NF4", "small", "few_rows nf4 1"),
    Row("linear layers in NF4, nested scales", "small", "few_rows nested nf4 1"),
    Row("linear layers in MXFP4", "small", "few_rows mxfp4 1"),
    Row("router, bf16", "small", "logits bf16"),
    Row("latent attention, 16 heads", "attention", "split V2-Lite bf16 mask none"),
    Row("latent attention, 128 heads", "attention", "split V3 bf16 mask none"),
    Row("cast to FP8, tiles of 1 × 128", "block_fp8", "cast_tiles"),
    Row("cast to FP8 of SwiGLU", "block_fp8", "cast_tiles of SwiGLU"),
    Row("cast from FP8", "block_fp8", "decode_blocks"),
    Row("experts' rows to FP8", "grouped", "quantize"),
    Row("experts, many rows in bf16", "grouped", "product", "grouped"),
    Row("experts, many rows in FP8", "grouped", "product fp8", "grouped_fp8"),
    Row("experts, Dgrad in FP8", "experts_fp8", "dgrad of 1", "grouped_fp8_turned"),
    Row("experts, Wgrad in bf16", "grouped", "outer", "grouped_outer"),
    Row("experts, Wgrad in FP8", "experts_fp8", "wgrad", "grouped_fp8_outer"),
    Row("experts' rows to FP8, turned for Wgrad", "experts_fp8", "cast_across of dy"),
    Row("experts' weights to FP8", "experts_fp8", "cast_blocks"),
)


def tables() -> dict[str, dict]:
    """What was compiled, by file."""
    paths = TABLES.glob("aot_*.json")
    return {path.stem.removeprefix("aot_"): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def share(row: Row, card: Card, per_byte: float) -> tuple[float, float]:
    """Of the card's bandwidth, or of its tensor cores, that the instructions allow at least and at most."""
    if row.tiles is None:
        return card.of_bandwidth(per_byte)
    tiles, is_fp8 = _triton_table.tiles(row.tiles, card.sm), "fp8" in row.tiles
    # bytes of both factors: the sum is over rows where there is an outer product
    sides = (tiles.columns + tiles.depth, tiles.rows) if row.is_outer else (tiles.rows + tiles.columns, tiles.depth)
    step = sides[0] * sides[1] * (1 if is_fp8 else 2)
    operations = 2 * tiles.rows * tiles.columns * tiles.depth
    return card.of_tensor_cores(per_byte * step, operations, card.fp8 if is_fp8 else card.bf16)


def lines() -> list[str]:
    """The table, as markdown."""
    heads = " | ".join(f"{card.name} (SM{card.sm})" for card in CARDS)
    found, compiled = [f"| | {heads} |", "|---|" + "---|" * len(CARDS)], tables()
    for row in ROWS:
        cells = []
        for card in CARDS:
            entry = compiled[row.file][row.kernel].get(str(card.sm))
            cells.append("–" if entry is None else _cell(entry["per_byte"], *share(row, card, entry["per_byte"])))
        mark = "" if row.tiles is None else " *"
        found.append(f"| {row.title}{mark} | {' | '.join(cells)} |")
    return found


def _cell(per_byte: float, least: float, most: float) -> str:
    low, high = f"{100 * least:.0f}", f"{100 * most:.0f}"
    return f"{per_byte:.1f}: {high if low == high else f'{low}–{high}'} %"


def page(text: str) -> str:
    """The page with its table as the files are now.

    Raises:
        ValueError: a page without a place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{PAGE}: found {begin or 'no ' + BEGIN}, {end or 'no ' + END}, wanted {BEGIN} and after it {END}"
        )
    return "\n".join((f"{before}{BEGIN}", *lines(), f"{END}{after}"))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
