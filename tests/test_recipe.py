"""Every block of docs/recipe.md runs as printed, one after the other, from an empty folder, and shows what it says."""

from pathlib import Path

import pytest
from doc_blocks import blocks, pattern, run

for library in ("peft", "bitsandbytes", "lm_eval", "math_verify"):
    pytest.importorskip(library)
pytestmark = pytest.mark.pages
BLOCKS = blocks(Path(__file__).resolve().parents[1] / "docs" / "recipe.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


def test_blocks_are_found():
    assert [block.language for block in BLOCKS] == ["python", "bash", "bash", "bash", "python", "bash", "python"]
    assert [number for number, block in enumerate(BLOCKS) if block.output] == [1, 2, 4, 6]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_and_shows_what_it_says(number, folder):
    """In their order: a later block takes what an earlier one wrote."""
    printed = "".join(" ".join(line.split()) + "\n" for line in run(BLOCKS[number], folder).splitlines())
    assert BLOCKS[number].output is None or pattern(BLOCKS[number].output).search(printed), printed
