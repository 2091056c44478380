"""The glossary says where each word is and is right; words that were given up stay out of code and docs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
ROW = re.compile(r"^\| (?P<words>[^|*]+) \| (?P<meaning>[^|]+) \| `(?P<file>[^`]+)` \|$", re.MULTILINE)
ROWS = [match.groupdict() for match in ROW.finditer(GLOSSARY.read_text(encoding="utf-8"))]

# The pattern, and what is said in its place.
OUT = {
    r"\bbeside\b": "next to, with, besides, compared with",
    r"\bbehind\b": "after, past",
    r"\banew\b": "again",
    r"\bnobody\b": "no one, or the sentence without it",
    r"\bso many\b": "the name of the number",
    r"\b(tokens|bytes|values|[0-9]) an? (token|second|parameter)\b": "per token, per second",
    r"\b(dissect|fit_experts|grow_in_place|Foresight)\b": "parameter_breakdown, enable_streaming_if_needed, ...",
}
SUFFIXES = {".py", ".md", ".c", ".h", ".js", ".html", ".yaml", ".toml"}
FOLDERS = ("modeling_deepseek_moe", "conversion", "eval", "docs", "tests", "benchmarks")
TEXTS = [
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "setup.py", "Makefile", "pyproject.toml")),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["words"])
def test_a_word_of_the_glossary_is_where_it_says(row):
    text = (ROOT / "modeling_deepseek_moe" / row["file"]).read_text(encoding="utf-8")
    words = re.findall(r"`([^`]+)`", row["words"]) or row["words"].split(", ")
    for word in words:
        assert re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", text, re.IGNORECASE), word


def test_the_glossary_is_one_table_that_the_readme_links():
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    headings = [line for line in lines if line.startswith("| **")]
    assert len(ROWS) == len(lines) - len(headings) - 2 > 40  # and its own head
    assert "docs/glossary.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_that_were_given_up(path):
    if path == Path(__file__):
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for pattern, better in OUT.items():
            assert not re.search(pattern, line, re.IGNORECASE), f"{path}:{number}: {line.strip()!r}: say {better}"
