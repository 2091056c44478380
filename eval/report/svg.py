"""The bar charts, in the manner of Figure 1 of the DeepSeek-V3 report: one panel a group.

In the page the panels wrap on a phone and colours follow the theme; `image` sets the same panels into one SVG file. Published
bars are filled; measured ones are hollow with a thick outline and an error bar, dashed where part was asked.
"""

from collections.abc import Sequence
from dataclasses import replace

from modeling_deepseek_moe.eval.report.figure import Bar, Figure, Group
from modeling_deepseek_moe.pages.document import style
from modeling_deepseek_moe.pages.texts import label, plain, words

# Pixels. A measured bar has more room: its number is bold, and may carry a star.
BAR, MEASURED_BAR, GUTTER, HEIGHT, HEADROOM, GAP, LEAST = 22, 32, 26, 200, 26, 6, 140
ROW = 1200  # what one row of panels may take; more are set three abreast

LINE, MARGIN, KEY, LETTER = (
    17,
    20,
    260,
    7,
)  # of the file: a line, the edge, the room of a legend's entry, a letter's at most
NAME = 60  # characters of a label in a chart

PATTERN = (
    '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="7" height="7" fill="#4D6BFE"/><rect width="1.6" height="7" fill="#fff"/></pattern></defs>'
)

IMAGE = """svg text { font-size: 12px; fill: var(--ink); } svg .title { font-size: 15px; font-weight: 700; }
svg .under { font-size: 11px; fill: var(--soft); text-anchor: middle; } svg .head { font-size: 12.5px; font-weight: 700; fill: var(--ink); }
svg .said { fill: var(--soft); } svg text.tick { font-size: 10px; fill: var(--soft); } svg text.value { font-size: 9.5px; }
"""


def draw(figures: Sequence[Figure]) -> str:
    """HTML; what has nothing measured in it is folded away."""
    parts = []
    for figure in figures:
        drawn = _figure(figure)
        if not figure.is_measured:
            drawn = (
                f"<details><summary>{label(figure.title)}, with nothing measured to compare</summary>{drawn}</details>"
            )
        parts.append(drawn)
    return f'<svg width="0" height="0" class="defs" aria-hidden="true">{PATTERN}</svg>' + "".join(parts)


def image(figures: Sequence[Figure]) -> str:
    """The figures as one SVG file, one above the other, on white; those with something measured, or else all."""
    figures = [figure for figure in figures if figure.is_measured] or figures
    parts, top, right = [], float(MARGIN), 400.0
    for figure in figures:
        drawn, width, height = _set(figure)
        parts.append(f'<g transform="translate({MARGIN} {top:g})">{drawn}</g>')
        top, right = top + height + MARGIN, max(right, width + 2 * MARGIN)
    look = style("theme").split("@media")[0] + style("plots") + IMAGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:g} {top:g}" width="{right:g}" height="{top:g}" '
        f'font-family="sans-serif"><style>{look}</style>{PATTERN}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _set(figure: Figure) -> tuple[str, float, float]:
    """A figure for the file: title, legend, panels in a row, remarks; and its width and height."""
    parts, y = [f'<text y="14" class="title">{plain(figure.title)}</text>'], 28
    columns = max(1, ROW // KEY)
    for i, bar in enumerate(figure.legend):
        place = f"translate({KEY * (i % columns)} {y + LINE * (i // columns)})"
        parts.append(
            f'<g transform="{place}">{_swatch(bar)}<text x="26" y="11.5">{plain(_kind(bar), NAME)}</text></g>'
        )
    y += LINE * -(-len(figure.legend) // columns) + 6
    x, most = 0, 0
    for group in figure.groups:
        middle = (_width(group) + GUTTER) / 2
        under = [group.title, group.metric, *(f"{bar.label[:NAME]}: {bar.note}" for bar in group.bars if bar.note)]
        texts = "".join(
            f'<text x="{middle:g}" y="{HEIGHT + HEADROOM + LINE * i}" class="{"under" if i > 1 else "under head"}">{plain(text)}</text>'
            for i, text in enumerate(under, 1)
        )
        parts.append(f'<g transform="translate({x} {y})">{_plot(group)}{texts}</g>')
        x, most = x + _width(group) + GAP, max(most, len(under))
    y += HEIGHT + HEADROOM + LINE * most + 10
    remarks = [*([figure.note] if figure.note else []), *_marks(figure)]
    parts += [
        f'<text y="{y + 10 + LINE * i}" class="said">{plain(text, 400)}</text>' for i, text in enumerate(remarks)
    ]
    longest = max(LETTER * len(text) for text in (*remarks, figure.title + "   "))
    return "".join(parts), max(x, KEY * min(columns, len(figure.legend)), longest), y + LINE * len(remarks)


def _figure(figure: Figure) -> str:
    panels = "".join(_panel(group) for group in figure.groups)
    widths = [_width(group) + GAP for group in figure.groups]
    row = sum(widths) if sum(widths) <= ROW else 3 * max(widths)
    note = f'<p class="note">{words(figure.note)}</p>' if figure.note else ""
    marks = "".join(f"<li>{text}</li>" for text in _marks(figure))
    return (
        f'<figure class="chart"><figcaption>{label(figure.title)}</figcaption>{note}<ul class="legend">'
        f'{"".join(_key(bar) for bar in figure.legend)}</ul><p class="axis">{label(figure.y_label)}</p>'
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
        found.append("* departs from the protocol, as the section Protocol tells.")
    return found


def _key(bar: Bar) -> str:
    swatch = f'<svg width="18" height="14" aria-hidden="true">{_swatch(bar)}</svg>'
    kind = "measured here" if bar.measured else "published"
    return f"<li{' class=measured' if bar.measured else ''}>{swatch}{label(bar.label, NAME)} <span>{kind}</span></li>"


def _swatch(bar: Bar) -> str:
    x, width, height = (1.5, 15, 11) if bar.measured else (0, 18, 14)
    return _rect(replace(bar, note=""), x, x, width, height)  # solid: whether part was asked is a fact of each bar


def _kind(bar: Bar) -> str:
    return f"{bar.label[:NAME]} ({'measured here' if bar.measured else 'published'})"


def _panel(group: Group) -> str:
    width = _width(group)
    notes = "".join(
        f'<span class="partial">{label(bar.label, NAME)}: {plain(bar.note).replace(" ", "&nbsp;")}</span>'
        for bar in group.bars
        if bar.note
    )
    return (
        f'<div class="panel" style="width:{width}px"><svg width="{width}" height="{HEIGHT + HEADROOM + 4}" '
        f'role="group" aria-label="{plain(group.title)}">{_plot(group)}</svg>'
        f"<b>{label(group.title)}</b><span>{label(group.metric)}</span>{notes}</div>"
    )


def _plot(group: Group) -> str:
    """Grid and bars of a panel."""
    width = _width(group)
    lines = "".join(
        f'<line x1="{GUTTER - 4}" x2="{width}" y1="{_y(value):g}" y2="{_y(value):g}" class="grid"/>'
        f'<text x="{GUTTER - 8}" y="{_y(value) + 3.5:g}" class="tick">{value}</text>'
        for value in range(0, 101, 20)
    )
    best = max(bar.value for bar in group.bars)
    left = GUTTER + (width - GUTTER - 4 - sum(map(_room, group.bars))) / 2
    starts = [left + sum(map(_room, group.bars[:i])) for i in range(len(group.bars))]
    return lines + "".join(_bar(bar, x, bar.value == best) for bar, x in zip(group.bars, starts, strict=True))


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
    return f'<g role="img" aria-label="{plain(_words(bar), 200)}"><title>{plain(_words(bar), 200)}</title>{body}</g>'


def _rect(bar: Bar, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:g}" y="{y:.1f}" width="{width:g}" height="{max(height, 0.5):.1f}"'
    if bar.measured:
        dashes = ";stroke-dasharray:4 3" if bar.note else ""
        return f'<rect {place} class="measured" style="stroke:{bar.color}{dashes}"/>'
    return f'<rect {place} fill="{"url(#hatch)" if bar.hatch else bar.color}" class="published"/>'


def _words(bar: Bar) -> str:
    if not bar.measured:
        return f"{bar.label[:NAME]}: {bar.value:.1f}, published"
    interval = "" if bar.low is None else f" ({bar.low:.1f} to {bar.high:.1f})"
    asked = f", on {bar.note} questions" if bar.note else ""
    changed = ", departs from the protocol" if bar.changed else ""
    return f"{bar.label[:NAME]}: {bar.value:.1f}{interval}, measured here{asked}{changed}"


def _room(bar: Bar) -> int:
    return MEASURED_BAR if bar.measured else BAR


def _width(group: Group) -> int:
    return max(LEAST, GUTTER + sum(map(_room, group.bars)) + 4)


def _y(value: float) -> float:
    return HEADROOM + HEIGHT * (1 - value / 100)
