"""``chart.png``: grouped bars in the manner of Figure 1 of the DeepSeek-V3 report, drawn with matplotlib.

Published bars are filled; measured ones are hollow with a thick outline and an error bar, dashed where part was asked.
"""

import io
from collections.abc import Sequence

from modeling_deepseek_moe.eval.report.figure import Bar, Figure, Group

# Along the axis, in bars: the room of a measured bar, the least of a group, the gap between groups, the least of a figure.
MEASURED_ROOM, GROUP_LEAST, GAP, LEAST = 1.5, 7, 1.7, 26
INCHES = 0.36  # of a bar


def draw(figures: Sequence[Figure]) -> bytes:
    """PNG of the figures, one above the other.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise ImportError("the report draws with matplotlib: pip install matplotlib") from None
    extent = max([LEAST, *(_extent(figure) for figure in figures)])
    canvas = Canvas(figsize=(INCHES * extent + 1.2, 7 * max(1, len(figures))), layout="constrained", facecolor="white")
    canvas.get_layout_engine().set(h_pad=0.25)
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(max(1, len(figures)), squeeze=False)[:, 0]
    for axis, figure in zip(axes, figures, strict=False):
        _draw(axis, figure, extent)
    if not figures:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no question was asked", ha="center")
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw(axis, figure: Figure, extent: float) -> None:
    start, middles = 0.0, []
    for group in figure.groups:
        best = max(bar.value for bar in group.bars)
        x = start + (_group_room(group) - sum(map(_room, group.bars))) / 2
        for bar in group.bars:
            _draw_bar(axis, bar, x + _room(bar) / 2, best=bar.value == best)
            x += _room(bar)
        middles.append(start + _group_room(group) / 2)
        start += _group_room(group) + GAP
    axis.set_xlim(-GAP / 2, extent - GAP / 2)
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel(_plain(figure.y_label), fontsize=12)
    axis.set_xticks(middles, [_tick(group) for group in figure.groups], fontsize=11, linespacing=1.4)
    axis.tick_params(axis="x", length=0)
    axis.yaxis.grid(True, linestyle="--", color="#D5D8DF", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(_plain(figure.title), fontsize=14, fontweight="bold", loc="left", pad=42)
    if figure.note:
        axis.set_xlabel(_plain(figure.note), loc="left", fontsize=10.5, color="#555B66", labelpad=10)
    _legend(axis, figure)


def _draw_bar(axis, bar: Bar, x: float, best: bool) -> None:
    if bar.measured:
        look = {"facecolor": "white", "edgecolor": bar.color, "linewidth": 2.4}
        axis.bar(x, bar.value, 0.85, linestyle="--" if bar.note else "-", **look)
    else:
        edge = "white" if bar.hatch else "#8A8F99"
        look = {"facecolor": bar.color, "edgecolor": edge, "hatch": "//" if bar.hatch else None}
        axis.bar(x, bar.value, 0.94, linewidth=0 if bar.hatch else 0.5, **look)
    if bar.low is not None:
        reach = [[bar.value - bar.low], [bar.high - bar.value]]
        axis.errorbar(x, bar.value, yerr=reach, color=bar.color, capsize=5, elinewidth=1.8, capthick=1.8)
    top = bar.value if bar.high is None else bar.high
    text = f"{bar.value:.1f}" + ("*" if bar.changed else "")
    color = bar.color if bar.measured else "#23262D"
    weight = "bold" if bar.measured or best else "normal"
    axis.text(x, top + 1.2, text, ha="center", va="bottom", fontsize=9.5, color=color, fontweight=weight)


def _legend(axis, figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = []
    for bar in figure.legend:
        if bar.measured:
            patch = Patch(facecolor="white", edgecolor=bar.color, linewidth=2.2, label=_name(bar))
        else:
            edge = "white" if bar.hatch else "#8A8F99"
            patch = Patch(facecolor=bar.color, edgecolor=edge, linewidth=0.5, label=_name(bar))
            patch.set_hatch("//" if bar.hatch else None)
        handles.append(patch)
    columns = min(4, len(handles)) or 1
    axis.legend(
        handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=10.5
    )
    axis.set_title(
        axis.get_title(loc="left"),
        fontsize=14,
        fontweight="bold",
        loc="left",
        pad=18 + 19 * -(-len(handles) // columns),
    )


def _name(bar: Bar) -> str:
    return _plain(f"{bar.label} ({'measured here' if bar.measured else 'published'})")


def _tick(group: Group) -> str:
    lines = [_plain(group.title), f"({group.metric})" if group.metric else ""]
    lines += [_plain(f"{bar.label[:28]}: {bar.note}") for bar in group.bars if bar.note]
    lines += ["* departs from the protocol"] if any(bar.changed for bar in group.bars) else []
    return "\n".join(line for line in lines if line)


def _room(bar: Bar) -> float:
    return MEASURED_ROOM if bar.measured else 1


def _group_room(group: Group) -> float:
    return max(GROUP_LEAST, sum(map(_room, group.bars)))


def _extent(figure: Figure) -> float:
    return sum(_group_room(group) + GAP for group in figure.groups)


def _plain(text: str) -> str:
    """A model's name is text, not mathematics: matplotlib would set what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")
