"""DeepSeek's protocols as data (``protocols.yaml``): each field with its value, and whether it is documented or assumed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("protocols.yaml")
SHARED_FIELDS = ("chat_template", "system_prompt", "template_args", "prefill", "thinking")


@dataclass(frozen=True)
class Field:
    """``status`` is ``"documented"`` or ``"assumed"``; ``source`` says where, or why."""

    value: Any
    status: str
    source: str


@dataclass(frozen=True)
class Protocol:
    """A suite: ``shared`` fields, and those of each benchmark. ``tasks`` names the lm-eval task of each benchmark."""

    name: str
    about: str
    shared: dict[str, Field]
    tasks: dict[str, str]
    fields: dict[str, dict[str, Field]]

    def values(self, benchmark: str) -> dict:
        return {name: field.value for name, field in (self.shared | self.fields[benchmark]).items()}

    def record(self, benchmarks: list[str]) -> dict:
        """As `Evaluation.protocol` keeps it: the fields of a benchmark as ``<benchmark>.<field>``."""
        fields = dict(self.shared)
        for benchmark in benchmarks:
            fields |= {f"{benchmark}.{name}": field for name, field in self.fields[benchmark].items()}
        return {"name": self.name, "about": self.about, "fields": {name: asdict(f) for name, f in fields.items()}}


def read_protocols(file: Path = FILE) -> dict[str, Protocol]:
    """
    Raises:
        ValueError: a field that is neither documented nor assumed, or both.
    """
    protocols = {}
    for name, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        shared = {key: _field(f"{name}.{key}", values[key]) for key in SHARED_FIELDS}
        fields = {
            benchmark: {
                key: _field(f"{name}.{benchmark}.{key}", value) for key, value in entry.items() if key != "task"
            }
            for benchmark, entry in values["tasks"].items()
        }
        tasks = {benchmark: entry["task"] for benchmark, entry in values["tasks"].items()}
        protocols[name] = Protocol(name, values["about"], shared, tasks, fields)
    return protocols


def protocol(suite: str) -> Protocol:
    """
    Raises:
        ValueError: no suite of that name.
    """
    protocols = read_protocols()
    if suite not in protocols:
        raise ValueError(f"--suite: found {suite!r}, wanted one of {', '.join(protocols)}")
    return protocols[suite]


def _field(where: str, entry: dict) -> Field:
    status = [key for key in ("documented", "assumed") if key in entry]
    if set(entry) != {"value", *status} or len(status) != 1:
        raise ValueError(f"{where}: found {sorted(entry)}, wanted 'value' and one of 'documented' and 'assumed'")
    return Field(entry["value"], status[0], str(entry[status[0]]))
