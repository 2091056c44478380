"""The bar charts as SVG in the page: one panel a group, so that they wrap on a phone; colours follow the page's theme."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from modeling_deepseek_moe.eval.report.figure import Bar, Figure, Group

# Pixels. A measured bar has more room: its number is bold, and may carry a star.
BAR, MEASURED_BAR, GUTTER, HEIGHT, HEADROOM, GAP, LEAST = 22, 32, 26, 200, 26, 6, 140
ROW = 1200  # what one row of panels may take; more are set three abreast

PATTERN = (
    '<svg width="0" height="0" class="defs" aria-hidden="true"><defs><pattern id="hatch" width="7" height="7" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="7" height="7" fill="#4D6BFE"/>'
    '<rect width="1.6" height="7" fill="#fff"/></pattern></defs></svg>'
)


def draw(figures: Sequence[Figure]) -> str:
    return PATTERN + "".join(_figure(figure) for figure in figures)


def _figure(figure: Figure) -> str:
    panels = "".join(_panel(group) for group in figure.groups)
    widths = [_width(group) + GAP for group in figure.groups]
    row = sum(widths) if sum(widths) <= ROW else 3 * max(widths)
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    marks = "".join(f"<li>{text}</li>" for text in _marks(figure))
    return (
        f'<figure class="chart"><figcaption>{escape(figure.title)}</figcaption>{note}<ul class="legend">'
        f'{"".join(_key(bar) for bar in figure.legend)}</ul><p class="axis">{escape(figure.y_label)}</p>'
        f'<div class="panels" style="max-width:{row}px">{panels}</div><ul class="marks">{marks}</ul></figure>'
    )


def _marks(figure: Figure) -> list[str]:
    measured = [bar for group in figure.groups for bar in group.bars if bar.measured]
    found = []
    if any(bar.low is not None for bar in measured):
        found.append("Whiskers: 95% interval over questions.")
    if any(bar.note for bar in measured):
        found.append("Dashed outline: only part of the questions was asked.")
    if any(bar.changed for bar in measured):
        found.append("* departs from the protocol; see below how.")
    return found


def _key(bar: Bar) -> str:
    x, width, height = (1.5, 15, 11) if bar.measured else (0, 18, 14)
    bar = replace(bar, note="")  # solid: whether part was asked is a fact of each bar
    swatch = f'<svg width="18" height="14" aria-hidden="true">{_rect(bar, x, x, width, height)}</svg>'
    kind = "measured here" if bar.measured else "published"
    return f"<li{' class=measured' if bar.measured else ''}>{swatch}{escape(bar.label)} <span>{kind}</span></li>"


def _panel(group: Group) -> str:
    width = _width(group)
    lines = "".join(
        f'<line x1="{GUTTER - 4}" x2="{width}" y1="{_y(value):g}" y2="{_y(value):g}" class="grid"/>'
        f'<text x="{GUTTER - 8}" y="{_y(value) + 3.5:g}" class="tick">{value}</text>'
        for value in range(0, 101, 20)
    )
    best = max(bar.value for bar in group.bars)
    left = GUTTER + (width - GUTTER - 4 - sum(map(_room, group.bars))) / 2
    starts = [left + sum(map(_room, group.bars[:i])) for i in range(len(group.bars))]
    bars = "".join(_bar(bar, x, bar.value == best) for bar, x in zip(group.bars, starts, strict=True))
    notes = "".join(
        f'<span class="partial">{escape(bar.label)}: {escape(bar.note).replace(" ", "&nbsp;")}</span>'
        for bar in group.bars
        if bar.note
    )
    return (
        f'<div class="panel" style="width:{width}px"><svg width="{width}" height="{HEIGHT + HEADROOM + 4}" '
        f'role="group" aria-label="{escape(group.title)}">{lines}{bars}</svg>'
        f"<b>{escape(group.title)}</b><span>{escape(group.metric)}</span>{notes}</div>"
    )


def _bar(bar: Bar, x: float, best: bool) -> str:
    inset = 6 if bar.measured else 1
    body = _rect(bar, x + inset, _y(bar.value), _room(bar) - 2 * inset, HEIGHT * bar.value / 100)
    middle, top = x + _room(bar) / 2, _y(bar.value if bar.high is None else bar.high)
    if bar.low is not None:
        low, high = _y(bar.low), _y(bar.high)
        path = f"M{middle - 4:g} {high:.1f}h8M{middle - 4:g} {low:.1f}h8M{middle:g} {high:.1f}V{low:.1f}"
        body += f'<path d="{path}" class="whisker" style="stroke:{bar.color}"/>'
    kind = ("value measured" if bar.measured else "value") + (" best" if best else "")
    mark = "*" if bar.changed else ""
    body += f'<text x="{middle:g}" y="{top - 4:.1f}" class="{kind}">{bar.value:.1f}{mark}</text>'
    return f'<g role="img" aria-label="{escape(_words(bar))}"><title>{escape(_words(bar))}</title>{body}</g>'


def _rect(bar: Bar, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:g}" y="{y:.1f}" width="{width:g}" height="{max(height, 0.5):.1f}"'
    if bar.measured:
        dashes = ";stroke-dasharray:4 3" if bar.note else ""
        return f'<rect {place} class="measured" style="stroke:{bar.color}{dashes}"/>'
    return f'<rect {place} fill="{"url(#hatch)" if bar.hatch else bar.color}" class="published"/>'


def _words(bar: Bar) -> str:
    if not bar.measured:
        return f"{bar.label}: {bar.value:.1f}, published"
    interval = "" if bar.low is None else f" ({bar.low:.1f} to {bar.high:.1f})"
    asked = f", on {bar.note} questions" if bar.note else ""
    changed = ", departs from the protocol" if bar.changed else ""
    return f"{bar.label}: {bar.value:.1f}{interval}, measured here{asked}{changed}"


def _room(bar: Bar) -> int:
    return MEASURED_BAR if bar.measured else BAR


def _width(group: Group) -> int:
    return max(LEAST, GUTTER + sum(map(_room, group.bars)) + 4)


def _y(value: float) -> float:
    return HEADROOM + HEIGHT * (1 - value / 100)
