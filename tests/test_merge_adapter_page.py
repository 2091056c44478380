"""Every block of the page on merging runs as printed, one after the other, from an empty folder, and shows what it says."""

from pathlib import Path

import pytest
from doc_blocks import blocks, pattern, run

BLOCKS = blocks(Path(__file__).resolve().parents[1] / "docs" / "merging.md")


@pytest.mark.pages
def test_the_page(tmp_path):
    pytest.importorskip("peft")
    shown = [block for block in BLOCKS if block.output]
    assert len(shown) == 2
    for block in BLOCKS:
        printed = "".join(" ".join(line.split()) + "\n" for line in run(block, tmp_path).splitlines())
        assert block.output is None or pattern(block.output).search(printed), printed
    fp32, fp8, base = (float(line.split()[0]) for line in printed.splitlines())
    assert fp32 < 1e-4 and fp8 < 0.2 * base
