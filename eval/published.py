"""The figures that DeepSeek published (``published.json``), by suite and benchmark. Percent, as printed there."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published.json")

# Questions in the whole benchmark; a local folder may hold fewer. Codeforces has no fixed set.
SIZES = {"mmlu_pro": 12_032, "gpqa_diamond": 198, "math500": 500, "math": 5000, "aime24": 30, "swebench": 500} | {
    name: 30 for name in ("aime25", "aime26", "hmmt_feb25")
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published model: ``scores`` by benchmark, percent; ``figure``: whether the figure shows it, or only the table."""

    name: str
    color: str
    scores: dict[str, float]
    hatch: bool = False
    figure: bool = True


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published table. ``metrics``: benchmark -> how it was scored, in the order of the figure."""

    title: str
    source: str
    url: str
    y_label: str
    metrics: dict[str, str]
    models: tuple[Model, ...]
    notes: tuple[str, ...] = ()


def published(suite: str) -> Published | None:
    """What was published of the models that a suite is for; None where the suite has no published figures."""
    return _tables().get(suite)


@cache
def _tables() -> dict[str, Published]:
    tables = {}
    for suite, values in json.loads(FILE.read_text(encoding="utf-8")).items():
        models = tuple(Model(name=name, **fields) for name, fields in values["models"].items())
        tables[suite] = Published(**values | {"models": models, "notes": tuple(values["notes"])})
    return tables
