"""Every block of the README runs as printed, one after the other, from an empty folder, and shows what it says.

A ``text`` block is the output of the block before it. "..." stands for anything within a line, and, alone, for any lines.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = (
    "make ",
    "pip install ",
)  # what a block that installs begins with: test_packaging and the Makefile's own use


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    output: str | None


def blocks() -> list[Block]:
    found = BLOCK.findall(README.read_text(encoding="utf-8"))
    following = [*found[1:], ("", "")]
    return [
        Block(language, code, shown if kind == "text" else None)
        for (language, code), (kind, shown) in zip(found, following, strict=True)
        if language != "text"
    ]


BLOCKS = blocks()
RUN = [block for block in BLOCKS if not block.code.startswith(INSTALLS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bare")


def run(block: Block, folder: Path) -> str:
    """Standard output; a command of several that fails is an error."""
    if block.language == "python":
        (folder / "block.py").write_text(block.code, encoding="utf-8")
        command = [sys.executable, "block.py"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "COLUMNS": "120", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # noqa: PLW1510
    assert done.returncode == 0, f"{block.code}\n{done.stderr}"
    return done.stdout


def pattern(shown: str) -> re.Pattern:
    """What a ``text`` block matches; spaces count as one."""
    lines = [line.split() for line in shown.splitlines()]
    parts = []
    for line in lines:
        text = re.escape(" ".join(line)).replace(re.escape("..."), "[^\n]*")
        parts.append("(?:[^\n]*\n)*?" if line == ["..."] else text + "\n")
    return re.compile("".join(parts))


def test_blocks_are_found():
    assert [block.language for block in BLOCKS] == ["bash", "bash", "python", "python", "bash", "bash", "bash"]
    assert all(block.output for block in RUN) and len(RUN) == 5


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
