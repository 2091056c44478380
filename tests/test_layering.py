"""Who may import whom, how long files and functions may be, and that each file says what it is.

Files are parsed, never imported: an import inside a function or under ``TYPE_CHECKING`` counts like any other.
"""

import ast
import importlib
import importlib.util
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from layers import LAYERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "modeling_deepseek_moe"
FOLDERS = ("conversion", "eval")  # installed as subpackages; they stand on the package
COMMANDS = {
    ("cli.convert", "conversion"),
    ("cli.eval", "eval"),
    ("cli.predict", "eval"),
    ("cli.report", "eval"),
}  # and the folder of each
MAX_LINES = 400  # a file's
MAX_FUNCTION = 60  # a function's, its signature and docstring too; in C the lines between its braces
NATIVE = (
    "absorbed_attention",
    "block_fp8",
    "decode_step",
    "experts",
    "four_bit",
    "indexer",
    "linear",
    "mla_project",
    "moe",
    "rms_norm",
    "routing",
    "sparse_attention",
)
# a user's `use_backend`; and whether there is an engine, of which a plan's figures depend
ALLOWED_NATIVE = {"__init__": {"ops._dispatch"}, "planning": {"ops._native"}}


def is_cli(name: str) -> bool:
    return name == "cli" or name.startswith("cli.")


def layer(name: str) -> int | None:
    """Index of the layer of a module, named as in ``LAYERS``; None when the table lacks it."""
    if is_cli(name):
        return len(LAYERS)
    return next((i for i, pattern in enumerate(LAYERS) if fnmatchcase(name, pattern)), None)


def find_modules() -> dict[str, Path]:
    """Full module name, as installed, -> file, for the package and the folders mapped into it."""
    modules = {}
    for folder, prefix in ((PACKAGE, PACKAGE), *((f, f"{PACKAGE}.{f}") for f in FOLDERS)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return modules


@cache
def read(source: str) -> tuple[list, dict[str, int], str | None]:
    """What several tests look at, parsed once: imports, the lines of each function by name and line, and the docstring."""
    tree, imports, functions = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        elif isinstance(node, ast.FunctionDef):
            functions[f"{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1
    return imports, functions, ast.get_docstring(tree)


def find_imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Full dotted names that ``source``, the text of ``module``, imports: ``a.b`` for ``from a import b``."""
    found = set()
    for node in read(source)[0]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join((*parents, *filter(None, [node.module])))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def owner(name: str, modules) -> str | None:
    """The module of ``modules`` that an imported name is, or is in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def short(module: str) -> str:
    return "__init__" if module == PACKAGE else module.removeprefix(f"{PACKAGE}.")


def in_folders(module: str) -> bool:
    return short(module).split(".")[0] in FOLDERS


def faults(module: str, imports: set[str], modules) -> list[str]:
    """What is wrong with the imports of a module of the package, in words."""
    wrong = []
    for target in sorted({owner(name, modules) for name in imports} - {None, module}):
        if (short(module), short(target).split(".")[0]) in COMMANDS:
            continue
        if in_folders(target):
            wrong.append(f"{short(module)} imports {target}: the package never imports {' or '.join(FOLDERS)}")
        elif is_cli(short(module)):
            continue
        elif is_cli(short(target)):
            wrong.append(f"{short(module)} imports {short(target)}: only cli imports cli")
        elif layer(short(target)) is not None and layer(short(target)) >= layer(short(module)):
            wrong.append(f"{short(module)} imports {short(target)}, which is not above it in LAYERS")
    return wrong


MODULES = find_modules()
IN_PACKAGE = [name for name in MODULES if not in_folders(name)]
SOURCES = [
    path for folder in (PACKAGE, *FOLDERS, "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
C_SOURCES = [path for folder in (ROOT / PACKAGE, ROOT / "tests") for path in sorted(folder.rglob("*.[ch]"))]


@pytest.mark.parametrize("module", IN_PACKAGE)
def test_imports_only_from_above(module):
    assert layer(short(module)) is not None, f"add {short(module)!r} to LAYERS in {Path(__file__).name}"
    path = MODULES[module]
    imports = find_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not faults(module, imports, MODULES)


@pytest.mark.parametrize("module", IN_PACKAGE)
def test_only_operations_and_the_engine_know_of_backends(module):
    """How a model's modules stay plain: what runs them natively looks at them, and they never at it."""
    if short(module).startswith(("ops", "engine")) or is_cli(short(module)):
        return
    path = MODULES[module]
    imports = find_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    native = {"ops._native", "ops._dispatch", "ops._library"} | {
        f"ops.{name}.{backend}" for name in NATIVE for backend in ("cpu", "triton")
    }
    found = {short(owner(name, MODULES)) for name in imports if owner(name, MODULES)} & native
    assert not found - ALLOWED_NATIVE.get(short(module), set()), f"{short(module)} imports {found}"


@pytest.mark.parametrize("module", [name for name in MODULES if in_folders(name)])
def test_folders_import_the_package_absolutely(module):
    path = MODULES[module]
    depth = len(short(module).split(".")) - (path.name != "__init__.py")
    for node in read(path.read_text(encoding="utf-8"))[0]:
        if isinstance(node, ast.ImportFrom):
            assert node.level <= depth, f"{path}:{node.lineno}: write the import from {PACKAGE} in full"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_import_of_a_bare_folder(path):
    imports = find_imports(path.read_text(encoding="utf-8"), "module")
    wrong = sorted(name for name in imports if name.split(".")[0] in FOLDERS)
    assert not wrong, f"{path}: import {wrong} as {PACKAGE}.<name>: a bare import loads a second module object"


def c_bodies(source: str) -> dict[str, int]:
    """Lines between the braces that follow a ``)`` outside all others, by line: functions, those of macros too."""
    found, depth, start = {}, 0, 0
    for number, line in enumerate(source.splitlines(), 1):
        text = line.rstrip("\\ \t")
        if depth == 0 and text.endswith(") {"):
            start = number
        depth += text.count("{") - text.count("}")
        if depth == 0 and start:
            found[f"line {start}"] = number - start - 1
            start = 0
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_short_and_documented(path):
    source = path.read_text(encoding="utf-8")
    _, functions, docstring = read(source)
    assert docstring, f"{path} has no docstring"
    assert len(source.splitlines()) <= MAX_LINES, f"{path} is over {MAX_LINES} lines"
    long = {name: lines for name, lines in functions.items() if lines > MAX_FUNCTION}
    assert not long, f"{path}: over {MAX_FUNCTION} lines: {long}"


@pytest.mark.parametrize("path", C_SOURCES, ids=lambda path: path.name)
def test_c_is_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES, f"{path} is over {MAX_LINES} lines"
    long = {name: lines for name, lines in c_bodies(source).items() if lines > MAX_FUNCTION}
    assert not long, f"{path}: over {MAX_FUNCTION} lines: {long}"


def test_finds_functions_and_their_lengths():
    python = "def f(\n    a,\n    b,\n):\n    x = 1\n    return x\n\nclass A:\n    def g(self): return 1\n"
    assert read(python)[1] == {"f:1": 6, "g:9": 1}
    c = "struct a {\n    int b;\n};\nstatic int f(int a,\n             int b) {\n    if (a) {\n    }\n    return b;\n}\nint g(void) {\n}\n"
    assert c_bodies(c) == {"line 5": 3, "line 10": 0}


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("block", "from .moe.layer import MoE", 0),
        ("block", "import torch\nfrom . import attention, layers", 0),
        ("block", "def f():\n    from .modeling import Model", 1),
        ("block", "import modeling_deepseek_moe.mtp", 1),
        ("block", "from modeling_deepseek_moe import hub, saving", 2),
        ("block", "from . import __version__", 1),
        ("block", "from .cli import main", 1),
        ("block", "from .conversion import inspect_checkpoint", 1),
        ("moe.router", "from .. import rope", 0),
        ("moe.router", "from . import experts", 1),
        ("cli.convert", "def f():\n    from modeling_deepseek_moe.conversion import diff", 0),
        ("cli.demo", "from modeling_deepseek_moe.conversion import diff", 1),
        ("cli.demo", "from . import chat\nfrom .. import modeling", 0),
    ],
)
def test_detects_forbidden_imports(module, source, wrong):
    names = (
        "block",
        "attention",
        "layers",
        "rope",
        "modeling",
        "mtp",
        "hub",
        "saving",
        "cli",
        "cli.demo",
        "cli.chat",
        "cli.convert",
    )
    names += ("moe", "moe.router", "moe.experts", "moe.layer", "conversion")
    modules = {PACKAGE, *(f"{PACKAGE}.{name}" for name in names)}
    module = f"{PACKAGE}.{module}"
    assert len(faults(module, find_imports(source, module), modules)) == wrong


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.name)
def test_benchmarks_import_what_there_is(file):
    """They run for minutes and in no other test: at least the names that they take from the package are there."""
    for node in read(file.read_text(encoding="utf-8"))[0]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )
