"""Where the questions come from: the Hub at a pinned revision, a local folder, or the rows that ship with the package.

GPQA and AIME are never bundled: their authors ask that the questions stay out of plain text on the web.
"""

import csv
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HUB, SAMPLE = "hub", "sample"
SAMPLES = Path(__file__).parent / "samples"
LETTERS = "ABCDEFGHIJ"
EXTENSIONS = ("jsonl", "json", "parquet", "csv")


@dataclass(frozen=True)
class Source:
    """A data set on the Hub, and what its rows must have.

    ``columns``: each needed column with the names it may have, in any case.
    """

    repository: str
    revision: str
    columns: dict[str, tuple[str, ...]]
    configs: tuple[str | None, ...] = (None,)
    splits: dict[str, str] = None
    gated: bool = False

    def split(self, ours: str) -> str:
        return (self.splits or {}).get(ours, ours)


MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
SOURCES = {
    "mmlu_pro": Source(
        "TIGER-Lab/MMLU-Pro",
        "b189ec765aa7ed75c8acfea42df31fdae71f97be",
        {name: (name,) for name in ("question_id", "question", "options", "answer", "cot_content", "category")},
    ),
    "math500": Source(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        {name: (name,) for name in ("problem", "solution", "answer", "subject", "unique_id")},
    ),
    "math": Source(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        {"problem": ("problem",), "solution": ("solution",), "subject": ("type", "subject")},
        configs=MATH_SUBJECTS,
    ),
    "gpqa_diamond": Source(
        "Idavidrein/gpqa",
        "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        {
            "question": ("Question",),
            "correct": ("Correct Answer",),
            **{f"incorrect_{i}": (f"Incorrect Answer {i}",) for i in (1, 2, 3)},
            "id": ("Record ID",),
            "category": ("High-level domain",),
        },
        configs=("gpqa_diamond",),
        splits={"test": "train"},
        gated=True,
    ),
    "aime24": Source(
        "HuggingFaceH4/aime_2024",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        {"problem": ("problem",), "answer": ("answer",), "id": ("id",)},
        splits={"test": "train"},
    ),
}


def load_rows(benchmark: str, split: str = "test", data: str | Path = HUB) -> tuple[list[dict], dict]:
    """Rows with the columns of `Source`, and where they came from, as `TaskRun.data` keeps it.

    Args:
        data: ``"hub"``, ``"sample"``, or a folder with ``<benchmark>/<split>.jsonl``, ``<benchmark>_<split>.jsonl`` or, for
            ``test``, ``<benchmark>.jsonl``; ``.json``, ``.parquet`` and ``.csv`` too.

    Raises:
        FileNotFoundError: no such file or folder; no such rows are shipped.
        ConnectionError: the Hub cannot be reached.
        PermissionError: the data set is gated, and there is no access.
        ValueError: a file cannot be read, has no rows, or lacks a column.
    """
    source = SOURCES[benchmark]
    if str(data) == HUB:
        rows, where = _from_hub(source, split), f"{source.repository}@{source.revision[:8]}"
        facts = {"source": HUB, "path": source.repository, "revision": source.revision}
    else:
        sample = str(data) == SAMPLE
        file = _find(SAMPLES if sample else Path(data), benchmark, split, sample)
        rows, where = _read(file), file
        facts = {
            "source": SAMPLE if sample else "folder",
            "path": file.name if sample else str(file),
            "revision": None,
        }
    rows = [_pick(source, row, where, number) for number, row in enumerate(rows, 1)]
    if not rows:
        raise ValueError(f"{where}: found no rows, wanted at least one question")
    digest = hashlib.sha256("\n".join(json.dumps(row, sort_keys=True) for row in rows).encode()).hexdigest()
    return rows, {**facts, "sha256": digest}


def _pick(source: Source, row: object, where: object, number: int) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: row {number}: found {type(row).__name__}, wanted an object with columns")
    found = {str(name).lower(): value for name, value in row.items()}
    picked = {}
    for column, names in source.columns.items():
        name = next((name.lower() for name in names if name.lower() in found), None)
        if name is None:
            raise ValueError(f"{where}: row {number}: found columns {sorted(row)}, wanted {names[0]!r} among them")
        picked[column] = found[name]
    return picked


def _from_hub(source: Source, split: str) -> Iterable[dict]:
    import datasets
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = source.repository
    try:
        return [
            row
            for config in source.configs
            for row in datasets.load_dataset(name, config, split=source.split(split), revision=source.revision)
        ]
    except (GatedRepoError, RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        if source.gated:
            raise PermissionError(
                f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login` or set "
                "HF_TOKEN; or give the rows with --data FOLDER"
            ) from error
        raise FileNotFoundError(f"{name}: not found on the Hub at revision {source.revision}: {error}") from error
    except (OSError, ConnectionError) as error:  # requests' and httpx's errors, and datasets' own, are OSErrors
        raise ConnectionError(
            f"{name}: cannot be fetched from the Hub ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "--data FOLDER takes rows from a folder, --data sample those that ship with the package"
        ) from error


def _find(folder: Path, benchmark: str, split: str, sample: bool) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: found no such folder; wanted a folder, 'hub' or 'sample'")
    stems = [f"{benchmark}/{split}", f"{benchmark}_{split}", *([benchmark] if split == "test" else [])]
    candidates = [f"{stem}.{extension}" for stem in stems for extension in EXTENSIONS]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    if sample:
        raise FileNotFoundError(f"the package ships no rows of {benchmark}: use --data FOLDER or --data hub")
    wanted = ", ".join(f"{stem}.jsonl" for stem in stems)
    raise FileNotFoundError(
        f"{folder}: found no {split} rows of {benchmark}, wanted {wanted} (.json, .parquet, .csv too)"
    )


def _read(file: Path) -> list[dict]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        with file.open(encoding="utf-8", newline="" if file.suffix == ".csv" else None) as lines:
            if file.suffix == ".csv":
                return list(csv.DictReader(lines))
            if file.suffix == ".json":
                rows = json.load(lines)
                if not isinstance(rows, list):
                    raise ValueError(f"found {type(rows).__name__}, wanted a list of rows")
                return rows
            return [_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    except (ValueError, csv.Error, UnicodeDecodeError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file}: {error}") from None


def _line(line: str, number: int) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: not JSON: {error}") from None
