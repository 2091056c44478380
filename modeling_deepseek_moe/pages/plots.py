"""Plots as SVG for a page: lines over steps, and heat maps whose cells are an image of a pixel each.

Text and grid take their colours from the page's theme, so that both of its schemes hold.
"""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from modeling_deepseek_moe.pages.texts import label, plain

# In turn: none is near a published model's colour, and each shows on white and on near-black.
COLORS = ("#D9480F", "#0B8A6A", "#A63BB8", "#B7860B")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 440, 190, 52, 32, 8, 20  # of a plot, in its own units
MOST_POINTS = 400  # of a line: more than a screen shows
FLAT = 0.1  # a range narrower than this share of its values is widened to it: noise is not zoomed in on
BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # none, the mean, twice the mean and more


def lines(title: str, about: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A figure with a line for each of ``series``, points ``(step, value)``; what is no number is left out, and said."""
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    lost = sum(len(points) for points in series.values()) - sum(map(len, finite.values()))
    every = [point for points in finite.values() for point in points]
    if not every:
        return _figure(title, about, '<p class="note">no finite value</p>', {})
    steps = [step for step, _ in every]
    (left, right), (low, high) = (min(steps), max(steps)), _range([value for _, value in every])
    across = _scale(left, right if right > left else left + 1, LEFT, WIDTH - RIGHT)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP)
    body = _grid(ticks(low, high), up, high - low) + _steps(left, right, across)
    for color, points in zip(_colors(len(finite)), finite.values(), strict=True):
        path = "L".join(f"{across(step):.1f} {up(value):.1f}" for step, value in thin(points))
        if len(points) == 1:
            body += f'<circle cx="{across(points[0][0]):.1f}" cy="{up(points[0][1]):.1f}" r="3" fill="{color}"/>'
        elif points:
            body += f'<path d="M{path}" class="line" style="stroke:{color}"/>'
    said = ", ".join(
        f"{name} {number(points[-1][1])} at step {points[-1][0]:,}" for name, points in finite.items() if points
    )
    note = f'<p class="note">{lost:,} values are no numbers and not drawn</p>' if lost else ""
    return _figure(title, about, _svg(HEIGHT, f"{title}: {said}", body) + note, finite)


def heat(
    title: str, about: str, values: np.ndarray, *, across: tuple[str, float, float], down: tuple[str, Sequence[str]]
) -> str:
    """A heat map of ``values``, ``[rows, columns]``, multiples of a mean: blue is 0, white 1, red 2 and more.

    Args:
        across: what the columns are, and the first and last of them; ``down``: what the rows are, and their names.
    """
    rows = len(values)
    height = TOP + BOTTOM + min(max(10 * rows, 90), 260)
    place = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{height - TOP - BOTTOM}"'
    image = base64.b64encode(png(values)).decode()
    body = f'<image {place} preserveAspectRatio="none" class="cells" href="data:image/png;base64,{image}"/>'
    name, names = down
    up = _scale(0, rows, TOP, height - BOTTOM)
    for row in range(0, rows, max(1, -(-rows // 8))):
        body += f'<text x="{LEFT - 6}" y="{up(row + 0.5) + 3.5:.1f}" class="tick">{plain(names[row], 8)}</text>'
    body += f'<text transform="translate(11 {(TOP + height - BOTTOM) / 2:.0f}) rotate(-90)" class="name">{plain(name)}</text>'
    what, first, last = across
    body += _steps(first, last, _scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT), height, what)
    said = f"{title}: {rows} rows of {values.shape[1]}, from {number(values.min())} to {number(values.max())} times the mean"
    return _figure(title, about, _svg(height, said, body), {})


def png(values: np.ndarray) -> bytes:
    """8 bits a pixel through a palette from blue over white to red; ``values`` from 0 to 2."""
    pixels = np.rint(np.clip(np.nan_to_num(values), 0, 2) * 127.5).astype(np.uint8)
    share = np.linspace(-1, 1, 256)[:, None]
    ends = np.where(share < 0, np.array([BLUE]), np.array([RED]))
    palette = np.rint(np.array([WHITE]) * (1 - abs(share)) + ends * abs(share)).astype(np.uint8)
    rows, columns = pixels.shape
    packed = np.hstack([np.zeros((rows, 1), np.uint8), pixels]).tobytes()  # each row after its filter: none
    parts = [(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)), (b"PLTE", palette.tobytes())]
    parts += [(b"IDAT", zlib.compress(packed, 9)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`, each the mean of its share."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [tuple(part.mean(0)) for part in np.array_split(np.array(points, dtype=float), MOST_POINTS)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values within the range: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * times for times in (1, 2, 5, 10) if (high - low) / (power * times) <= most)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three or four digits: ``0.0123``, ``4.512``, ``12,300``."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of the values, with room for the line; never below 0 where they are not."""
    low, high = min(values), max(values)
    least = max(FLAT * max(abs(low), abs(high)), 1e-12)
    room = max((least - (high - low)) / 2, 0.05 * (high - low))
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _grid(values: Sequence[float], up, span: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(span))) if span < 100 else 0
    texts = [f"{value:.{digits}f}" if span >= 1e-4 and abs(value) < 1e6 else f"{value:.3g}" for value in values]
    while digits and all("." in text and text.endswith("0") for text in texts):
        texts = [text[:-1].removesuffix(".") for text in texts]
    return "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{up(value) + 3.5:.1f}" class="tick">{text}</text>'
        for value, text in zip(values, texts, strict=True)
    )


def _steps(first: float, last: float, across, height: float = HEIGHT, what: str = "step") -> str:
    shown = [value for value in ticks(first, last) if value == int(value)] if last > first else [first]
    texts = "".join(
        f'<text x="{across(value):.1f}" y="{height - BOTTOM + 14}" class="name">{value:,.0f}</text>' for value in shown
    )
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height - BOTTOM}" y2="{height - BOTTOM}" class="axis-line"/>'
    return f'{line}{texts}<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 4}" class="name">{plain(what)}</text>'


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _svg(height: float, said: str, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{plain(said, 400)}">{body}</svg>'


def _figure(title: str, about: str, body: str, series: Mapping) -> str:
    keys = "".join(
        f'<li><svg width="18" height="10" aria-hidden="true"><path d="M0 5h18" class="line" style="stroke:{color}"/></svg>'
        f"{label(name)}</li>"
        for color, name in zip(_colors(len(series)), series, strict=True)
    )
    legend = f'<ul class="legend">{keys}</ul>' if len(series) > 1 else ""
    return f'<figure class="plot"><figcaption>{label(title)}<small>{label(about, 300)}</small></figcaption>{body}{legend}</figure>'
