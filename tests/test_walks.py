"""docs/walks.md is what a run of the code shows."""

import re
import runpy
from pathlib import Path

from engine_cases import needs_engine

DOCS = Path(__file__).parent.parent / "docs"
CSRC = DOCS.parent / "modeling_deepseek_moe" / "ops" / "csrc"


@needs_engine
def test_the_page_is_the_way_through_the_code():
    walks = runpy.run_path(str(DOCS / "walks.py"))
    assert walks["page"]() == (DOCS / "walks.md").read_text(), "run python docs/walks.py"


def test_the_functions_in_c_are_there():
    walks = runpy.run_path(str(DOCS / "walks.py"))
    for entry in walks["ENGINE"]:
        file, name = entry.split()
        assert re.search(rf"^\w.*\b{name}\(", (CSRC / file).read_text(), re.MULTILINE), entry
