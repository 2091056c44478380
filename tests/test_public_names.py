"""The public names: all of them are there, are seen by completion and type checkers, and are what the docs call."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_deepseek_moe as dsm

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CALLED = re.compile(r"\bdsm\.([A-Za-z]\w*)")


@pytest.mark.parametrize("name", dsm.__all__)
def test_resolves(name):
    value = getattr(dsm, name)
    assert name == "__version__" or value.__name__ == name
    assert name == "__version__" or value.__module__.startswith(dsm.__name__)


@pytest.mark.slow
def test_completion_sees_all_before_any_is_used():
    """In a new interpreter: a lazy name that was used once is in the module's globals and proves nothing."""
    code = "import modeling_deepseek_moe as dsm; print(sorted(set(dsm.__all__) - set(dir(dsm))), 'later' in dir(dsm))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] False"


def test_type_checkers_see_all():
    """What they read is the file: every name is imported or assigned at the top, lazy ones under TYPE_CHECKING."""
    tree = ast.parse((ROOT / dsm.__name__ / "__init__.py").read_text(encoding="utf-8"))
    branches = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in (tree, *branches) for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(branches) == 1
    assert set(dsm.__all__) <= {alias.asname or alias.name for node in imports for alias in node.names}


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'BalanceLoss'"):
        dsm.BalanceLoss


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_call_what_there_is(page):
    called = set(CALLED.findall(page.read_text(encoding="utf-8")))
    assert called <= set(dsm.__all__), f"{page.name}: {sorted(called - set(dsm.__all__))} is not public"


def test_docs_call_most_of_it():
    """That the check above finds anything."""
    called = {name for page in PAGES for name in CALLED.findall(page.read_text(encoding="utf-8"))}
    assert {"inspect_checkpoint", "make_plan", "tiny_checkpoint", "use_backend"} <= called


IMPORTED = re.compile(rf"^ *(?:from|import) ({dsm.__name__}[\w.]*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_import_public_modules_alone(page):
    imported = set(IMPORTED.findall(page.read_text(encoding="utf-8")))
    public = re.compile(rf"{dsm.__name__}(\.(eval|tiny)(\.\w+)*)?")
    assert all(public.fullmatch(name) for name in imported), f"{page.name}: {sorted(imported)}"
