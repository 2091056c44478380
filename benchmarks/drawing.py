"""Charts as SVG, with nothing but the standard library: bars in a grid of machines and measures, and intervals on a line.

Each chart is a card with its own background, light or dark as the reader's system is, so that it is legible wherever it is shown.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
svg { --card: #ffffff; --ink: #1b1e25; --soft: #5b6270; --line: #dfe2e9; --ours: #3a56e8; --other: #9aa2b1; --third: #c5cad4 }
@media (prefers-color-scheme: dark) {
  svg { --card: #14161b; --ink: #e8eaf0; --soft: #a0a7b6; --line: #323744; --ours: #7f94ff; --other: #79818f; --third: #505766 }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink) }
.title { font-size: 19px; font-weight: 700 } .soft { fill: var(--soft) } .note { fill: var(--soft); font-size: 12px }
.head { font-weight: 600 } .value { font-weight: 700 } .end { text-anchor: end } .middle { text-anchor: middle }
.ours { fill: var(--ours) } .other { fill: var(--other) } .third { fill: var(--third) } .card { fill: var(--card) }
.line { stroke: var(--line); fill: none } .bar { stroke: var(--ours); stroke-width: 3 } .band { fill: var(--line); opacity: .6 }
"""
EDGE, BAR, STEP = 20, 15, 21  # px: of the card, a bar, from one bar to the next
LABEL = 104  # px for the names of the bars
VALUE = 86  # px right of the longest bar, for its figure


@dataclass(frozen=True)
class Bar:
    """``value`` in the column's unit; ``text`` stands at its end, and ``remark``, softer, after that."""

    name: str
    value: float
    kind: str  # a class of the style: ours, other, third
    text: str
    remark: str = ""


@dataclass(frozen=True)
class Grid:
    """A chart: a title that claims something, and for each machine (row) and measure (column) its bars."""

    title: str
    subtitle: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: dict[tuple[str, str], tuple[Bar, ...]]  # by row and column
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """A row of points, their mean and its interval."""

    name: str
    points: tuple[float, ...]
    mean: float
    low: float
    high: float
    kind: str = "ours"


def draw(grid: Grid, *, narrow: bool = False) -> str:
    """The chart: columns next to each other, or, for a phone, below each other."""
    return _below(grid) if narrow else _abreast(grid)


def _abreast(grid: Grid) -> str:
    width = 960
    across = (width - 2 * EDGE - LABEL) // len(grid.columns)
    out, y = _opening(grid.title, grid.subtitle, width)
    for index, column in enumerate(grid.columns):
        out.append(_text(EDGE + LABEL + index * across, y, column, "soft"))
    y += 12
    for row in grid.rows:
        out.append(f'<path class="line" d="M{EDGE} {y}H{width - EDGE}"/>')
        y += 22
        out.append(_text(EDGE, y, row, "head"))
        y += 10
        names = list(dict.fromkeys(bar.name for column in grid.columns for bar in grid.cells.get((row, column), ())))
        out += [_text(EDGE, y + 12 + STEP * place, name, "soft") for place, name in enumerate(names)]
        for index, column in enumerate(grid.columns):
            scale = (across - VALUE) / _most(grid, column)
            for bar in grid.cells.get((row, column), ()):
                out += _bar(bar, EDGE + LABEL + index * across, y + STEP * names.index(bar.name), scale)
        y += STEP * len(names) + 8
    return _closing(out, grid.note, width, y)


def _below(grid: Grid) -> str:
    width = 400
    out, y = _opening(grid.title, grid.subtitle, width)
    for column in grid.columns:
        scale = (width - 2 * EDGE - LABEL - VALUE) / _most(grid, column)
        out.append(f'<path class="line" d="M{EDGE} {y}H{width - EDGE}"/>')
        y += 24
        out.append(_text(EDGE, y, column, "head"))
        for row in grid.rows:
            y += 24
            out.append(_text(EDGE, y, row, "soft"))
            y += 8
            for bar in grid.cells.get((row, column), ()):
                out.append(_text(EDGE, y + 12, bar.name, "soft"))
                out += _bar(bar, EDGE + LABEL, y, scale)
                y += STEP
        y += 16
    return _closing(out, grid.note, width, y)


def draw_spreads(
    title: str, subtitle: str, groups: Sequence[tuple[str, Sequence[Spread]]], band: float, note: str
) -> str:
    """Points, means and intervals in per cent about zero, a line each; ``band`` is the tolerated distance, shaded."""
    width, left = 460, 172
    out, y = _opening(title, subtitle, width)
    spreads = [spread for _, group in groups for spread in group]
    most = max(abs(value) for spread in spreads for value in (*spread.points, spread.low, spread.high)) * 1.05
    middle, scale = left + (width - EDGE - left) / 2, (width - EDGE - left) / 2 / most
    top, bottom = y + 8, y + sum(26 + 26 * len(group) for _, group in groups) + 10
    out.append(
        f'<rect class="band" x="{middle - band * scale:.1f}" y="{top}" width="{2 * band * scale:.1f}" height="{bottom - top}"/>'
    )
    out.append(f'<path class="line" d="M{middle:.1f} {top}V{bottom}"/>')
    for name, group in groups:
        y += 26
        out.append(_text(EDGE, y, name, "head"))
        for spread in group:
            y += 26
            out.append(_text(EDGE, y, spread.name, "soft"))
            points = [
                f'<circle class="other" cx="{middle + value * scale:.1f}" cy="{y - 4}" r="3"/>'
                for value in spread.points
            ]
            low, high, mean = (middle + value * scale for value in (spread.low, spread.high, spread.mean))
            out += [f'<path class="bar" d="M{low:.1f} {y - 4}H{high:.1f}"/>', *points]
            out.append(f'<circle class="{spread.kind}" cx="{mean:.1f}" cy="{y - 4}" r="5.5"/>')
    y = bottom + 16
    for value in (-band, 0, band):
        text = "0" if not value else f"{value:+.2f} %".replace("-", "−")
        out.append(_text(middle + value * scale, y, text, "note middle"))
    return _closing(out, note, width, y + 6)


def _opening(title: str, subtitle: str, width: int) -> tuple[list[str], int]:
    out, y = [f"<title>{escape(title)}</title><style>{STYLE}</style>", ""], EDGE
    for line in _lines(title, width, 12.4):
        y += 22
        out.append(_text(EDGE, y - 6, line, "title"))
    y += 4
    for line in _lines(subtitle, width, 7.9):
        y += 18
        out.append(_text(EDGE, y - 4, line, "soft"))
    return out, y + 22


def _closing(out: list[str], note: str, width: int, y: int) -> str:
    for line in _lines(note, width, 7.4):
        y += 16
        out.append(_text(EDGE, y, line, "note"))
    height = y + EDGE
    out[1] = f'<rect class="card" width="{width}" height="{height}" rx="8"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    return "\n".join([head, *out, "</svg>"]) + "\n"


def _lines(text: str, width: int, letter: float) -> list[str]:
    """The text in as few lines as fit, of like length; ``letter``: px of one in DejaVu Sans, the widest of the fonts."""
    most = int((width - 2 * EDGE) / letter)
    fewest = len(textwrap.wrap(text, most))
    return next(lines for size in range(1, most + 1) if len(lines := textwrap.wrap(text, size)) <= fewest)


def _most(grid: Grid, column: str) -> float:
    return max(bar.value for row in grid.rows for bar in grid.cells.get((row, column), ()))


def _bar(bar: Bar, x: float, y: float, scale: float) -> list[str]:
    length = max(bar.value * scale, 1.5)
    remark = f' <tspan class="soft" font-weight="400">{escape(bar.remark)}</tspan>' if bar.remark else ""
    kind = "value" if bar.kind == "ours" else "soft"
    return [
        f'<rect class="{bar.kind}" x="{x:g}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>',
        f'<text class="{kind}" x="{x + length + 6:.1f}" y="{y + 12}">{escape(bar.text)}{remark}</text>',
    ]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'
