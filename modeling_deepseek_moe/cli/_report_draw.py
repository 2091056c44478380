"""The page of ``deepseek-moe report`` for a training: last figures, curves, and where the experts' load went."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.pages import plots
from modeling_deepseek_moe.pages.document import document, table
from modeling_deepseek_moe.pages.texts import label, words

LOADS_FILE = "expert_load.jsonl"
STATE_FILE = "trainer_state.json"
PAGE, NUMBERS = "report.html", "report.json"
MOST_SLICES = 200  # of time in a heat map
# Title, what it says, and the names in the log that are drawn together.
LOSSES = (
    ("Loss", "per label, of training and of held-out rows", ("lm_loss", "loss", "eval_loss")),
    ("MTP loss", "of predicting the tokens after the next", ("mtp_loss",)),
    ("Balance loss", "the sequence-wise loss that evens expert loads", ("balance_loss",)),
    ("Indexer loss", "KL of the indexers' scores to what attention attends to, all layers", ("indexer_loss",)),
)
BALANCE = (
    (
        "Load violation",
        "load of the busiest expert over the mean, less 1: 0 is even",
        ("max_vio", "max_vio_worst_layer", "max_vio_epoch"),
    ),
    ("Load entropy", "of an expert's share of the tokens: 1 is even", ("load_entropy",)),
    ("Dead experts", "got no token since the last log", ("dead_experts",)),
    ("Selection bias", "smallest and largest correction of an expert's score", ("bias_min", "bias_max")),
)
COURSE = (
    ("Learning rate", "", ("learning_rate",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Speed", "tokens per second", ("tokens_per_second",)),
)
CARDS = (
    "step",
    "epoch",
    "lm_loss",
    "loss",
    "eval_loss",
    "max_vio",
    "load_entropy",
    "dead_experts",
    "tokens_per_second",
)
SAME = ("lm_loss", "loss"), ("max_vio", "max_vio_epoch")  # of a pair that is one curve, the first is drawn


def draw(folder: Path, out: Path) -> tuple[Path, dict]:
    """Report the training in ``folder`` into ``out``; the page, and the last figures that were logged.

    Raises:
        FileNotFoundError: no ``trainer_state.json`` in ``folder`` or its checkpoints.
        ValueError: nothing was logged, or a line of it is damaged.
    """
    history = read_history(folder)
    loads = read_loads(folder)
    last = {}
    for entry in history:
        last |= entry
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / NUMBERS, json.dumps({"format": 1, "last": last, "history": history}, indent=1) + "\n")
    write_file(out / PAGE, page(folder, history, loads, last))
    return out / PAGE, last


def read_history(folder: Path) -> list[dict]:
    """What `Trainer` logged: of the folder, or else of its latest checkpoint."""
    numbered = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    checkpoints = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    candidates = [folder, *reversed(checkpoints)]
    file = next((path / STATE_FILE for path in candidates if (path / STATE_FILE).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder}: found no {STATE_FILE}, there or in a checkpoint: is it a training's folder?"
        )
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        steps = [entry["step"] + 0 for entry in history]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: found no log of a Trainer ({error}), wanted log_history with a step in each entry"
        ) from None
    if not steps:
        raise ValueError(f"{file}: found nothing logged, wanted at least one step of it: logging_steps says how often")
    return history


def read_loads(folder: Path) -> list[dict]:
    """``{"step": int, "load": {layer: [tokens of expert 0, ...]}}`` of each log; none where no telemetry was on."""
    file = next((path / LOADS_FILE for path in (folder, folder.parent) if (path / LOADS_FILE).is_file()), None)
    if file is None:
        return []
    loads = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            shapes = {
                layer: np.array(counts, dtype=float).shape
                for layer, counts in entry["load"].items()
                if int(layer) >= 0
            }
            if not entry["step"] >= 0 or any(len(shape) != 1 or not shape[0] for shape in shapes.values()):
                raise ValueError("no step, or no counts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}:{number}: found no expert loads ({error}), wanted step, and load by layer"
            ) from None
        loads.append(entry)
    return loads


def relative(loads: list[dict], layer: str) -> np.ndarray:
    """``[slices of time, experts]``: load as a multiple of the mean, at most `MOST_SLICES` rows."""
    counts = np.array([line["load"][layer] for line in loads if layer in line["load"]], dtype=float)
    counts = np.stack([part.sum(0) for part in np.array_split(counts, min(MOST_SLICES, len(counts)))])
    return counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)


def page(folder: Path, history: Sequence[dict], loads: list[dict], last: dict) -> str:
    sections = [("figures", "Last figures", _cards(last))]
    for place, title, groups in (
        ("losses", "Losses", LOSSES),
        ("balance", "Balance of the experts", BALANCE),
        ("course", "Course", COURSE),
    ):
        if drawn := "".join(_curves(history, *group) for group in groups):
            sections.append((place, title, f'<div class="plots">{drawn}</div>'))
    if loads:
        sections.append(("load", "Expert load", _loads(loads)))
    sections.append(("all", "All figures", _all(last)))
    logged = f"{len(history):,} log entries, steps {history[0]['step']:,} to {history[-1]['step']:,}"
    return document(
        "Training",
        folder.resolve().name,
        about=[f"<b>{label(folder.resolve().name)}</b> {logged}"],
        links=[(place, title) for place, title, _ in sections],
        body="\n".join(f'<section id="{place}"><h2>{title}</h2>{body}</section>' for place, title, body in sections),
    )


def _curves(history: Sequence[dict], title: str, about: str, names: Sequence[str]) -> str:
    """The names that were logged, in one plot; nothing where none was."""
    series = {}
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if isinstance(entry.get(name), int | float)]
        if points:
            series[name] = points
    for kept, twin in SAME:
        if kept in series and series.get(twin) == series[kept]:
            del series[twin]
    return plots.lines(title, about, series) if series else ""


def _loads(loads: list[dict]) -> str:
    """Layer by expert over the last tenth of the training, then expert by time, a layer each."""
    last = loads[-max(1, len(loads) // 10) :]
    layers = sorted(last[-1]["load"], key=int)
    first, end = loads[0]["step"], loads[-1]["step"]
    by_layer = [relative(last, layer).mean(0) for layer in layers]
    whole = np.zeros((len(layers), max(map(len, by_layer))))
    for row, values in zip(whole, by_layer, strict=True):
        row[: len(values)] = values
    about = f"steps {last[0]['step']:,} to {end:,}; blue is no token, white the mean, red twice the mean and more"
    drawn = [plots.heat("All layers", about, whole, across=("expert", 0, whole.shape[1] - 1), down=("layer", layers))]
    for layer in layers:
        values = relative([line for line in loads if layer in line["load"]], layer).T
        names = [str(expert) for expert in range(len(values))]
        drawn.append(
            plots.heat(f"Layer {layer}", "over time", values, across=("step", first, end), down=("expert", names))
        )
    return f'<p class="note">Tokens of each expert as a multiple of the layer\'s mean.</p><div class="plots">{"".join(drawn)}</div>'


def _cards(last: dict) -> str:
    cards = [
        f"<li><b>{_figure(last[name])}</b>{label(name.replace('_', ' '))}</li>"
        for name in CARDS
        if _is_number(last.get(name))
    ]
    return f'<ul class="figures">{"".join(cards)}</ul>'


def _all(last: dict) -> str:
    rows = [
        [f"<code>{label(name)}</code>", words(_figure(value))]
        for name, value in sorted(last.items())
        if _is_number(value)
    ]
    return f"<details><summary>{len(rows)} figures, each as last logged</summary>{table(('Name', 'Value'), rows)}</details>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return plots.number(value)
