"""The drawings of ``deepseek-moe report``: curves, heat maps, and the page that holds them."""

import base64
import html
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modeling_deepseek_moe.checkpoint.atomic import write_file

LOADS_FILE = "expert_load.jsonl"
STATE_FILE = "trainer_state.json"
LOSSES = ("loss", "lm_loss", "mtp_loss", "balance_loss", "eval_loss")
BALANCE = ("max_vio", "max_vio_worst_layer", "max_vio_epoch", "load_entropy", "dead_experts", "bias_min", "bias_max")
MOST_SLICES = 200  # of time in a heat map


def draw(folder: Path, out: Path) -> tuple[Path, dict]:
    """Draw into ``out``; the page, and the last figures that were logged.

    Raises:
        FileNotFoundError: no ``trainer_state.json`` in ``folder`` or its checkpoints.
        ValueError: nothing was logged.
    """
    history = read_history(folder)
    loads = read_loads(folder)
    out.mkdir(parents=True, exist_ok=True)
    figures = {"losses": curves(history, LOSSES, "loss")}
    if any(name in entry for entry in history for name in BALANCE):
        figures["balance"] = curves(history, BALANCE, "balance of the experts")
    if loads:
        figures["load"] = load_by_layer(loads)
        figures["load-over-time"] = load_over_time(loads)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
    last = {}
    for entry in history:
        last |= entry
    page = out / "report.html"
    write_file(page, _page(folder, last, {name: out / f"{name}.png" for name in figures}))
    return page, last


def read_history(folder: Path) -> list[dict]:
    """What `Trainer` logged: of the folder, or else of its latest checkpoint."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    candidates = [folder, *reversed(checkpoints)]
    file = next((path / STATE_FILE for path in candidates if (path / STATE_FILE).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder}: found no {STATE_FILE}, there or in a checkpoint: is it a training's folder?"
        )
    history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    if not history:
        raise ValueError(f"{file}: found nothing logged, wanted at least one step of it")
    return history


def read_loads(folder: Path) -> list[dict]:
    """``{"step": int, "load": {layer: [tokens of expert 0, ...]}}`` of each log; none where no telemetry was on."""
    file = next((path / LOADS_FILE for path in (folder, folder.parent) if (path / LOADS_FILE).is_file()), None)
    return [] if file is None else [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def relative(loads: list[dict], layer: str) -> np.ndarray:
    """``[slices of time, experts]``: load as a multiple of the mean, at most `MOST_SLICES` rows."""
    counts = np.array([line["load"][layer] for line in loads if layer in line["load"]], dtype=float)
    counts = np.stack([part.sum(0) for part in np.array_split(counts, min(MOST_SLICES, len(counts)))])
    return counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)


def curves(history: list[dict], names: tuple[str, ...], title: str) -> Figure:
    present = [name for name in names if any(name in entry for entry in history)]
    figure = Figure(figsize=(9, 2.1 * len(present)), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(present), 1, sharex=True)), present, strict=True):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.suptitle(title)
    return figure


def load_by_layer(loads: list[dict]) -> Figure:
    """Layer × expert, over the last tenth of the training."""
    last = loads[-max(1, len(loads) // 10) :]
    layers = sorted(last[-1]["load"], key=int)
    values = np.stack([relative(last, layer).mean(0) for layer in layers])
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    _heat(figure, axes, values)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(xlabel="expert", ylabel="layer", title=f"load ÷ mean, steps {last[0]['step']} to {last[-1]['step']}")
    return figure


def load_over_time(loads: list[dict]) -> Figure:
    """Expert × time, one heat map a layer."""
    layers = sorted(loads[-1]["load"], key=int)
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, layer in zip(grid, layers, strict=False):
        values = relative(loads, layer).T
        extent = (loads[0]["step"], max(loads[-1]["step"], loads[0]["step"] + 1), len(values) - 0.5, -0.5)
        _heat(figure, axes, values, extent)
        axes.set(title=f"layer {layer}", xlabel="step", ylabel="expert")
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    return figure


def _heat(figure: Figure, axes, values: np.ndarray, extent=None) -> None:
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=axes)


def _page(folder: Path, last: dict, images: dict[str, Path]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>"
        for name, value in sorted(last.items())
        if isinstance(value, int | float)
    )
    pictures = "".join(
        f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
        for name, file in images.items()
    )
    title = f"Training {html.escape(folder.resolve().name)}"
    style = "body{font:15px sans-serif;margin:2em auto;max-width:60em}img{max-width:100%}td{padding:0 1em 0 0}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{pictures}<h2>last figures</h2><table>{rows}</table></html>\n"
    )
