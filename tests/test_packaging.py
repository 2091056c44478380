"""What a wheel holds: everything of the package, and nothing generic in site-packages."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "modeling_deepseek_moe"
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = (PACKAGE, "conversion", "eval")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy: an old ``build/`` in the tree would leak removed files into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


@pytest.mark.long
def test_nothing_generic_at_the_top(wheel):
    version = Path(wheel.filename).name.split("-")[1]
    assert {name.split("/")[0] for name in wheel.namelist()} == {PACKAGE, f"{PACKAGE}-{version}.dist-info"}


@pytest.mark.long
def test_holds_every_module(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py")}
    for folder in FOLDERS[1:]:
        expected |= {f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    assert f"{PACKAGE}/conversion/__init__.py" in expected
    assert f"{PACKAGE}/eval/__init__.py" in expected
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


@pytest.mark.long
def test_holds_what_evaluation_reads(wheel):
    files = [path for path in (ROOT / "eval").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    expected = {f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert len(expected) > 20 and expected <= set(wheel.namelist())


@pytest.mark.long
def test_console_script(wheel):
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert f"deepseek-moe = {PACKAGE}.cli:main" in wheel.read(name).decode()
