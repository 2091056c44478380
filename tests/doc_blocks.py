"""The blocks of a page of docs, run as printed one after the other in a folder; a ``text`` block is what the one before it prints.

"..." stands for anything within a line, and, alone, for any lines.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    output: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    following = [*found[1:], ("", "")]
    return [
        Block(language, code, shown if kind == "text" else None)
        for (language, code), (kind, shown) in zip(found, following, strict=True)
        if language != "text"
    ]


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
