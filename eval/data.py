"""Where the questions come from: the Hub at a pinned revision, a local folder, or the rows that ship with the package.

GPQA and AIME are never bundled: their authors ask that the questions stay out of plain text on the web.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from modeling_deepseek_moe.eval import rows as kinds
from modeling_deepseek_moe.eval.rows import Rule

HUB, SAMPLE = "hub", "sample"
SAMPLES = Path(__file__).parent / "samples"
EXTENSIONS = ("jsonl", "json", "parquet", "csv")


@dataclass(frozen=True)
class Source:
    """A data set on the Hub, and what its rows must have.

    ``columns``: each needed column with the names it may have, in any case. ``rules``: what it must hold. ``identity``: the column
    that names a row. ``together``: what the columns must be together.
    """

    repository: str
    revision: str
    columns: dict[str, tuple[str, ...]]
    rules: dict[str, Rule]
    identity: str | None = None
    together: Callable[[dict, dict], tuple[str, object, str] | None] | None = None
    configs: tuple[str | None, ...] = (None,)
    splits: dict[str, str] = None
    gated: bool = False

    def split(self, ours: str) -> str:
        return (self.splits or {}).get(ours, ours)


MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
_CONTEST: dict[str, Rule] = {"problem": kinds.text, "answer": kinds.contest_answer, "id": kinds.name}
SOURCES = {
    "mmlu_pro": Source(
        "TIGER-Lab/MMLU-Pro",
        "b189ec765aa7ed75c8acfea42df31fdae71f97be",
        {name: (name,) for name in ("question_id", "question", "options", "answer", "cot_content", "category")},
        {
            "question_id": kinds.name,
            "question": kinds.text,
            "options": kinds.options,
            "category": kinds.text,
            "cot_content": kinds.perhaps_text,
        },
        identity="question_id",
        together=kinds.multiple_choice,
    ),
    "math500": Source(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        {name: (name,) for name in ("problem", "solution", "answer", "subject", "unique_id")},
        {
            "problem": kinds.text,
            "answer": kinds.answer,
            "subject": kinds.perhaps_text,
            "unique_id": kinds.name,
        },
        identity="unique_id",
    ),
    "math": Source(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        {"problem": ("problem",), "solution": ("solution",), "subject": ("type", "subject")},
        {"problem": kinds.text, "solution": kinds.boxed_solution, "subject": kinds.perhaps_text},
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
        {
            "question": kinds.text,
            **{name: kinds.option for name in ("correct", "incorrect_1", "incorrect_2", "incorrect_3")},
            "id": kinds.name,
            "category": kinds.perhaps_text,
        },
        identity="id",
        configs=("gpqa_diamond",),
        splits={"test": "train"},
        gated=True,
    ),
    "aime24": Source(
        "HuggingFaceH4/aime_2024",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        {"problem": ("problem",), "answer": ("answer",), "id": ("id",)},
        _CONTEST,
        identity="id",
        splits={"test": "train"},
    ),
    "aime25": Source(
        "math-ai/aime25",
        "563bb8404243c5f09de6ec262f2db674fe5bce9b",
        {"problem": ("problem",), "answer": ("answer",), "id": ("id", "problem_idx")},
        _CONTEST,
        identity="id",
    ),
    "aime26": Source(
        "MathArena/aime_2026",
        "d2de22f3c656b4f56cf8981212186377d1e23bc3",
        {"problem": ("problem",), "answer": ("answer",), "id": ("problem_idx", "id")},
        _CONTEST,
        identity="id",
        splits={"test": "train"},
    ),
    "hmmt_feb25": Source(
        "MathArena/hmmt_feb_2025",
        "6fdc4277120810ff75aa22d2d5489b91f7a262a1",
        {"problem": ("problem",), "answer": ("answer",), "id": ("problem_idx", "id")},
        _CONTEST | {"answer": kinds.answer},
        identity="id",
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
        ValueError: a file cannot be read or has no rows, or a row lacks a column or holds there what no row may; the message names
            file, row, column, and what was found and wanted.
    """
    source = SOURCES[benchmark]
    if str(data) == HUB:
        where: object = f"{source.repository}@{source.revision[:8]}"
        numbered: list[tuple[int, object]] = list(enumerate(_from_hub(source, split), 1))
        facts = {"source": HUB, "path": source.repository, "revision": source.revision}
    else:
        sample = str(data) == SAMPLE
        file = _find(SAMPLES if sample else Path(data), benchmark, split, sample)
        numbered, where = read_file(file), file
        facts = {
            "source": SAMPLE if sample else "folder",
            "path": file.name if sample else str(file),
            "revision": None,
        }
    rows = _checked(source, numbered, where)
    if not rows:
        raise ValueError(f"{where}: found no rows, wanted at least one question")
    digest = hashlib.sha256("\n".join(json.dumps(row, sort_keys=True) for row in rows).encode()).hexdigest()
    return rows, {**facts, "sha256": digest}


def _checked(source: Source, numbered: list[tuple[int, object]], where: object) -> list[dict]:
    picked = [(number, *_pick(source, row, where, number)) for number, row in numbered]
    names = {column: known[0] for column, known in source.columns.items()}
    kinds.check([(number, row) for number, row, _ in picked], source.rules, where, source.identity, names)
    for number, row, given in picked:
        if source.together and (fault := source.together(row, given)):
            raise kinds.unfit(where, number, *fault)
    return [row for _, row, _ in picked]


def _pick(source: Source, row: object, where: object, number: int) -> tuple[dict, dict]:
    """The needed columns, and all by their lower-case names."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: row {number}: found {type(row).__name__}, wanted an object with columns")
    found = {str(name).lower(): value for name, value in row.items()}
    picked = {}
    for column, names in source.columns.items():
        name = next((name.lower() for name in names if name.lower() in found), None)
        if name is None:
            raise ValueError(f"{where}: row {number}: found columns {sorted(row)}, wanted {names[0]!r} among them")
        picked[column] = found[name]
    return picked, found


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


def read_file(file: Path) -> list[tuple[int, object]]:
    """Rows with their numbers: of lines in JSON lines, else counted from 1.

    Raises:
        ValueError: it cannot be read. FileNotFoundError: there is none.
    """
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1))
        # utf-8-sig: editors on Windows put a mark at the beginning
        with file.open(encoding="utf-8-sig", newline="" if file.suffix == ".csv" else None) as lines:
            if file.suffix == ".csv":
                return [(number, _csv_row(row, number)) for number, row in enumerate(csv.DictReader(lines), 1)]
            if file.suffix == ".json":
                rows = json.load(lines)
                if not isinstance(rows, list):
                    raise ValueError(f"found {type(rows).__name__}, wanted a list of rows")
                return list(enumerate(rows, 1))
            return [(number, _line(line, number)) for number, line in enumerate(lines, 1) if line.strip()]
    except (
        ValueError,
        csv.Error,
        RecursionError,
    ) as error:  # pyarrow's errors are ValueErrors, and UnicodeDecodeError is one
        raise ValueError(f"{file}: {error}") from None


def _csv_row(row: dict, number: int) -> dict:
    """A comma outside quotes shifts all that follows."""
    if None in row or None in row.values():
        count = sum(name is not None and value is not None for name, value in row.items()) + len(row.get(None, ()))
        raise ValueError(f"row {number}: found {count} fields, wanted the {len(row) - (None in row)} of the header")
    return row


def _line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: not JSON: {error}") from None
