"""docs/architecture.md says where things are, and its picture is what the layering table says."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TEXT = (DOCS / "architecture.md").read_text(encoding="utf-8")
# what each answer names, and the file that has it
ANSWERS = {
    "a weight format": ("modeling_deepseek_moe/formats/__init__.py", "FORMATS = ("),
    "a backend for an operation": ("modeling_deepseek_moe/ops/_dispatch.py", "def choose("),
    "a model type": ("modeling_deepseek_moe/families.py", "FAMILIES"),
    "a conversion": ("conversion/_table.py", "CONVERSIONS"),
    "a benchmark": ("benchmarks/common.py", "def interleave("),
}


def test_the_picture_is_the_table_s():
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    wanted = (DOCS / "architecture.svg").read_text(encoding="utf-8")
    assert drawing.draw() == wanted, "run `python docs/architecture.py`"
    parts = {part for _, row in drawing.strips() for part, _ in row}
    assert all(step in parts for path in drawing.PATHS.values() for step in path)


@pytest.mark.parametrize("question", ANSWERS)
def test_answers(question):
    """Five questions of a newcomer, each with a link to a file that has what the answer names."""
    [answer] = re.findall(rf"\*\*\.\.\. {question}\?\*\*(.*?)(?=\n\n\*\*|\Z)", TEXT, re.DOTALL)
    links = [(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", answer)]
    file, symbol = ANSWERS[question]
    assert all(link.exists() for link in links) and ROOT / file in links
    assert symbol in (ROOT / file).read_text(encoding="utf-8")
    names = re.findall(r"`(\w+)`", answer)
    sources = "\n".join(link.read_text(encoding="utf-8") for link in links if link.is_file())
    assert all(name in sources for name in names if name.isupper() or "_" not in name), names


@pytest.mark.parametrize("file", sorted([ROOT / "README.md", *DOCS.glob("*.md")]), ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / link).exists(), link
