"""Every block of the README runs as printed, one after the other, from an empty folder, and shows what it says.

A ``text`` block is the output of the block before it. "..." stands for anything within a line, and, alone, for any lines.
"""

import re
from pathlib import Path

import pytest
from doc_blocks import blocks, pattern, run

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
INSTALLS = (
    "make ",
    "pip install ",
)  # what a block that installs begins with: test_packaging and the Makefile's own use


BLOCKS = blocks(README)
RUN = [block for block in BLOCKS if not block.code.startswith(INSTALLS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bare")


def test_blocks_are_found():
    assert [block.language for block in BLOCKS] == ["bash", "bash", "python", "python", "bash", "bash", "bash"]
    assert all(block.output for block in RUN) and len(RUN) == 5


@pytest.mark.pages
@pytest.mark.parametrize("number", range(len(RUN)), ids=lambda number: RUN[number].code.splitlines()[-1][:40])
def test_a_block_runs_and_shows_what_it_says(number, folder):
    """In their order: a later block takes what an earlier one wrote."""
    block = RUN[number]
    printed = "".join(" ".join(line.split()) + "\n" for line in run(block, folder).splitlines())
    assert pattern(block.output).search(printed), printed


def test_the_demo_and_the_tests_are_targets_of_make():
    [block] = [block for block in BLOCKS if block.code.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.code.splitlines():
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize(
    ("shown", "printed", "matches"),
    [
        ("a ... c\n", "a b c\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("14 + 14 = 28\n", "14 + 14 = 29\n", False),
    ],
)
def test_what_is_shown_is_compared(shown, printed, matches):
    assert bool(pattern(shown).search(printed)) == matches
