"""Building the CPU engine and loading what was built: without a compiler, without OpenMP, stale, cut short, elsewhere."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from engine_cases import needs_engine, random_fp8
from releases import same_bits
from transformers.utils import logging

from modeling_deepseek_moe import BackendError, use_backend
from modeling_deepseek_moe.ops import _native, block_fp8, linear, rms_norm

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "modeling_deepseek_moe" / "ops" / "csrc"
SOURCES = sorted(CSRC.glob("*.c"))
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas")
GCC, CLANG = shutil.which("gcc"), shutil.which("clang")
needs_gcc = pytest.mark.skipif(GCC is None, reason="gcc is not installed")
needs_clang = pytest.mark.skipif(CLANG is None, reason="clang is not installed")


@pytest.fixture
def load(monkeypatch):
    """Load a file as the engine: ``(library, reason)``."""

    def load(file: Path | None):
        spec = None if file is None else importlib.machinery.ModuleSpec(_native.MODULE, None, origin=str(file))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        return _native._load.__wrapped__()

    return load


def built() -> Path:
    return Path(importlib.util.find_spec(_native.MODULE).origin)


def compiled(source: str, file: Path, *flags) -> Path:
    command = [GCC, "-shared", "-fPIC", "-x", "c", "-", "-o", file, *flags]
    subprocess.run(command, check=True, input=source, text=True)
    return file


# Loading. What is loaded in this process and is no whole library would kill it.


@needs_engine
def test_a_copy_loads(load, tmp_path):
    library, reason = load(Path(shutil.copy(built(), tmp_path / "copy.so")))
    assert reason is None and library.dsm_version() == _native.VERSION


@needs_engine
def test_a_library_cut_short(load, tmp_path):
    data = built().read_bytes()
    for size in (0, 1, 63, 64, 1000, 4096, len(data) // 2, len(data) - 4096, len(data) - 1):
        file = tmp_path / f"{size}.so"
        file.write_bytes(data[:size])
        library, reason = load(file)
        assert library is None and "einstall the package" in reason and str(file) in reason, (size, reason)


def test_a_library_that_is_none(load, tmp_path):
    file = tmp_path / "engine.so"
    for data in (b"text\n" * 1000, b"\x7fELF" + bytes(4000)):
        file.write_bytes(data)
        library, reason = load(file)
        assert library is None and reason.startswith("cannot be loaded: ") and str(file) in reason
    library, reason = load(tmp_path / "missing.so")
    assert library is None and reason.startswith("cannot be loaded: ") and "missing.so" in reason


@needs_gcc
@pytest.mark.parametrize(
    "source",
    ["int dsm_version(void) { return 999; }", "int other;", f"int dsm_version(void) {{ return {_native.VERSION}; }}"],
    ids=["another-version", "no-version", "functions-missing"],
)
def test_a_library_of_another_version(load, tmp_path, source):
    file = compiled(source, tmp_path / "engine.so")
    assert load(file) == (None, f"is of another version ({file}): reinstall the package")


def test_a_library_that_was_not_built(load):
    library, reason = load(None)
    assert library is None
    assert "was not built: no C compiler" in reason and "Install gcc or clang" in reason


def stubs(folder: Path, header: str) -> Path:
    """A library with the structs of ``header`` in which nothing else is real: no threads, and the right version."""
    (folder / "abi.h").write_text(header)
    for name in ("engine.h", "layout.c"):
        shutil.copy(CSRC / name, folder)
    real = {"dsm_version": _native.VERSION, "dsm_has_threads": 0, "dsm_layout": None}
    functions = [f"int {name}(void) {{ return {real.get(name, 0)}; }}" for name in _native._SIGNATURES]
    source = "\n".join(["#include <layout.c>", *(line for line in functions if "dsm_layout" not in line)])
    source = source.replace("int dsm_", '__attribute__((visibility("default"))) int stub_dsm_')
    names = [name for name in _native._SIGNATURES if name != "dsm_layout"]
    renamed = "\n".join(f'asm(".globl {name}\\n.set {name}, stub_{name}");' for name in names)
    return compiled(f"{source}\n{renamed}\n", folder / "engine.so", "-std=gnu11", f"-I{folder}")


@needs_gcc
def test_one_thread_is_told(load, tmp_path, caplog, monkeypatch):
    """Once, as the library is loaded."""
    monkeypatch.setattr(_native.logger, "propagate", True)
    _native.logger.warning_once.cache_clear()
    assert load(stubs(tmp_path, (CSRC / "abi.h").read_text()))[1] is None
    assert "built without OpenMP and runs on one thread" in caplog.text


@needs_gcc
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("int64_t rows, cols;", "int64_t cols, rows;", "Matrix.rows: found 8 bytes at 24, wanted 8 bytes at 16"),
        ("    float eps;\n", "    double eps;\n", "Norm.eps: found 8 bytes at 8, wanted 4 bytes at 8"),
        (
            "    int rope_interleave;",
            "    int64_t more[2];\n    int rope_interleave;",
            "MlaShape: found 64 bytes at 0",
        ),
    ],
    ids=["order", "size", "another-field"],
)
def test_another_layout_is_refused(load, tmp_path, old, new, words):
    header = (CSRC / "abi.h").read_text()
    assert header.count(old) == 1
    library, reason = load(stubs(tmp_path, header.replace(old, new)))
    assert library is None and reason.startswith("has another layout") and words in reason
    assert reason.endswith("reinstall the package")


def test_without_the_engine(monkeypatch, caplog):
    """``auto`` says once what it falls back from; ``cpu`` raises, also for what plain torch would do."""
    monkeypatch.setattr(_native, "_load", lambda: (None, "was not built: install gcc"))
    monkeypatch.setattr(_native.logger, "propagate", True)
    _native.instruction_sets.cache_clear()
    _native.logger.warning_once.cache_clear()
    logging.set_verbosity_warning()
    codes, scale = random_fp8((200, 130))
    x, weight = torch.randn(2, 130).bfloat16(), torch.randn(200, 130).bfloat16()
    try:
        with use_backend("reference"):
            wanted = block_fp8.linear(x, codes, scale)
        with use_backend("auto"):
            for _ in range(3):
                assert same_bits(block_fp8.linear(x, codes, scale), wanted)
                linear.linear(x, weight)
                rms_norm.rms_norm(x, weight[0], 1e-6)
                block_fp8.quantize(x)
        assert caplog.text.count("The CPU engine was not built: install gcc. FP8 runs on the reference path") == 1
        calls = (
            lambda: block_fp8.linear(x, codes, scale),
            lambda: block_fp8.dequantize(codes, scale, torch.float32),
            lambda: block_fp8.quantize(x),
            lambda: linear.linear(x, weight),
            lambda: rms_norm.rms_norm(x, weight[0], 1e-6),
        )
        for backend in ("cpu", "cpu:avx2"):
            for call in calls:
                with (
                    use_backend(backend),
                    pytest.raises(BackendError, match=r"backend 'cpu': .* not built: install gcc"),
                ):
                    call()
        with pytest.raises(BackendError, match="not built"):
            torch.ops.deepseek_moe.bf16_linear(x, weight, None)
    finally:
        _native.instruction_sets.cache_clear()


# Building, from a copy of the sources.


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("modeling_deepseek_moe", "conversion", "eval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def execute(command, folder, **environment) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def installed(source: Path, **environment) -> Path:
    """The folder that ``source`` is installed into."""
    target = source.parent / "target"
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target]
    execute([*command, source], source.parent, **environment)
    return target


LOOK = """
import torch
import modeling_deepseek_moe
from modeling_deepseek_moe.ops import _native, block_fp8
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend

print("from", modeling_deepseek_moe.__file__)
print("instruction sets", *_native.instruction_sets())
codes, scale = block_fp8.quantize(torch.randn(700, 900))
x = torch.randn(3, 900)
with use_backend("reference"):
    wanted = block_fp8.linear(x, codes, scale)
for _ in range(2):
    torch.testing.assert_close(block_fp8.linear(x, codes, scale), wanted, rtol=1e-5, atol=1e-4)
with use_backend("cpu"):
    try:
        block_fp8.linear(x, codes, scale)
        print("ran")
    except BackendError as error:
        print("refused:", error)
"""


def look(target: Path, folder: Path, **environment) -> str:
    out = execute([sys.executable, "-c", LOOK], folder, PYTHONPATH=str(target), **environment)
    assert f"from {target}" in out
    return out


@pytest.mark.long
def test_install_without_a_compiler(source, tmp_path):
    target = installed(source, CC="/bin/false")
    assert not list(target.rglob("*.so"))
    out = look(target, tmp_path)
    assert (
        out.count("The CPU engine was not built: no C compiler was found") == 1
    )  # from auto; the other is the error's
    assert "refused: backend 'cpu': the CPU engine was not built" in out and "Install gcc or clang" in out


@pytest.mark.long
@needs_gcc
def test_install_without_openmp(source, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *fopenmp*) echo "no OpenMP" >&2; exit 1;; esac\nexec {GCC} "$@"\n')
    compiler.chmod(0o755)
    out = look(installed(source, CC=str(compiler)), tmp_path)
    assert out.count("built without OpenMP and runs on one thread") == 1
    assert "instruction sets baseline" in out and "\nran\n" in out


@pytest.mark.long
@needs_gcc
def test_installed_elsewhere(source, tmp_path):
    """A wheel built from a source distribution, in another folder: with the engine, for every Python from 3.11 on."""
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    execute([sys.executable, "-c", code, tmp_path / "dist"], source)
    [archive] = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert {file.relative_to(ROOT).as_posix() for file in CSRC.iterdir() if file.suffix in (".c", ".h")} <= names
    [unpacked] = (tmp_path / "unpacked").iterdir()
    wheels = tmp_path / "wheels"
    execute(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, unpacked], tmp_path
    )
    [wheel] = wheels.iterdir()
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "modeling_deepseek_moe/ops/_engine.abi3.so" in archive.namelist()
        archive.extractall(tmp_path / "site")
    out = look(tmp_path / "site", tmp_path)
    assert "instruction sets baseline" in out and "\nran\n" in out and "The CPU engine" not in out


@pytest.mark.long
@needs_clang
def test_built_by_clang(source, tmp_path):
    """Passes the tests of the engine; with one thread where clang has no OpenMP."""
    execute([sys.executable, "setup.py", "build_ext", "--inplace"], source, CC=CLANG)
    assert "\nran\n" in look(source, tmp_path)
    tests = [ROOT / "tests" / name for name in ("test_engine.py", "test_engine_experts.py", "test_engine_robust.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", *tests]
    out = execute(command, source, PYTHONPATH=str(source))
    assert "passed" in out and "skipped" not in out


def openmp_flags(compiler) -> list[str]:
    """Without OpenMP, which clang may lack, no one uses the number of threads."""
    return ["-fopenmp"] if compiler == GCC else ["-Wno-unused-parameter"]


@pytest.mark.parametrize(
    "compiler",
    [pytest.param(GCC, marks=needs_gcc, id="gcc"), pytest.param(CLANG, marks=needs_clang, id="clang")],
)
@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_compiler_warns(compiler, file):
    execute([compiler, *FLAGS, *openmp_flags(compiler), "-fsyntax-only", file], ROOT)


@pytest.mark.long
@pytest.mark.parametrize(
    "compiler",
    [pytest.param(GCC, marks=needs_gcc, id="gcc"), pytest.param(CLANG, marks=needs_clang, id="clang")],
)
@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_compiler_warns_when_it_optimises(compiler, file, tmp_path):
    execute([compiler, *FLAGS, *openmp_flags(compiler), "-O3", "-c", file, "-o", tmp_path / "out.o"], ROOT)
