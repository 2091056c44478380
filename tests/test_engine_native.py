"""The C code of the CPU engine outside of this processor and this compiler's defaults: sanitizers, aarch64, no AVX2.

Calls are recorded here and played back by `engine_harness.c` under an emulator. All of this builds C code: long.
"""

import ctypes
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from engine_calls import every_call, run
from engine_cases import needs_engine

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import use_backend

pytestmark = [needs_engine, pytest.mark.long]

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SOURCES = sorted((ROOT / "modeling_deepseek_moe" / "ops" / "csrc").glob("*.c"))
GCC, CROSS_GCC = shutil.which("gcc"), shutil.which("aarch64-linux-gnu-gcc")
QEMU_ARM, QEMU_X86 = shutil.which("qemu-aarch64"), shutil.which("qemu-x86_64")
needs_gcc = pytest.mark.skipif(GCC is None, reason="gcc is not installed")

# Recording. What each argument of a function is, after the instruction set and the threads: "i" or "f" (a number),
# a number of bytes that are read, or (bytes, dtype) that are written; dtype -1: to the last bit.
FUNCTIONS = ("dsm_linear", "dsm_experts", "dsm_rms_norm", "dsm_dequantize", "dsm_quantize", "dsm_mla_decode")
FUNCTIONS += ("dsm_mla_project", "dsm_route", "dsm_moe")
ITEMSIZES = {code: dtype.itemsize for dtype, code in _native.DTYPES.items()}
EXACT = -1


def blocks(rows, columns):
    return 4 * math.ceil(rows / 128) * math.ceil(columns / 128)


def describe_linear(dtype, x, tokens, kind, data, scale, rows, columns, bias, y):
    size = ITEMSIZES[dtype]
    read = tokens * columns * size, rows * columns * ITEMSIZES[kind], blocks(rows, columns), 4 * rows
    return "i", read[0], "i", "i", read[1], read[2], "i", "i", read[3], (tokens * rows * size, dtype)


def expert_sizes(hidden, width, kind):
    codes = hidden * width * ITEMSIZES[kind]
    scales = (blocks(width, hidden), blocks(width, hidden), blocks(hidden, width)) if kind == 3 else (0, 0, 0)
    return [size for scale in scales for size in (codes, scale)]


def describe_experts(dtype, x, tokens, hidden, width, indices, weights, top_k, table, count, kind, sums, out):
    entries = expert_sizes(hidden, width, kind) * count
    x_bytes = tokens * hidden * ITEMSIZES[dtype]
    slots = tokens * top_k
    results = (4 * tokens * hidden, 0), (x_bytes, dtype)
    return "i", x_bytes, "i", "i", "i", 8 * slots, 4 * slots, "i", entries, "i", "i", *results


def describe_rms_norm(dtype, x, weight, tokens, n, eps, out):
    size = ITEMSIZES[dtype]
    return "i", tokens * n * size, n * size, "i", "i", "f", (tokens * n * size, dtype)


def describe_dequantize(codes, scale, rows, columns, out, dtype):
    return rows * columns, blocks(rows, columns), "i", "i", (rows * columns * ITEMSIZES[dtype], EXACT), "i"


def describe_quantize(x, dtype, rows, columns, codes, scale):
    size = rows * columns
    return size * ITEMSIZES[dtype], "i", "i", "i", (size, EXACT), (blocks(rows, columns), EXACT)


def describe_mla_decode(dtype, sizes, q_nope, q_pe, c_kv, k_pe, strides, mask, kind, weight, scale, scaling, out):
    batch, heads, length, nope, rope, rank, value = sizes
    size, rows = ITEMSIZES[dtype], heads * (nope + value)
    queries = batch * heads * nope * size, batch * heads * rope * size
    caches = batch * length * rank * size, batch * length * rope * size
    weights = rows * rank * ITEMSIZES[kind], blocks(rows, rank)
    masks = 4 * batch * length
    return "i", 56, *queries, *caches, 56, masks, "i", *weights, "f", (batch * heads * value * size, dtype)


def describe_mla_project(dtype, x, dims, matrices, query_norm, query_eps, latent_norm, latent_eps, cos, sin, *results):
    (tokens, heads, nope, rope, rank, _), size = dims, ITEMSIZES[dtype]
    entries = []
    for place in range(0, 15, 5):
        rows, columns, kind = matrices[place + 2 : place + 5]
        entries += [rows * columns * ITEMSIZES[kind], blocks(rows, columns), -1, -1, -1]
    outputs = [(tokens * width * size, dtype) for width in (heads * (nope + rope), rank, rope)]
    norms = matrices[2] * size, rank * size
    angles = 4 * tokens * rope // 2
    return "i", tokens * matrices[13] * size, 48, entries, norms[0], "f", norms[1], "f", angles, angles, *outputs


def describe_route(logits, tokens, experts, bias, groups, kept, top_k, softmax, two, normalise, factor, *results):
    slots = tokens * top_k
    return 4 * tokens * experts, "i", "i", 4 * experts, *"iiiiii", "f", (4 * slots, 0), (8 * slots, EXACT)


def describe_moe(dtype, x, dims, gate, bias, factor, table, shared, out):
    tokens, hidden, width, experts, *_, kind, wide, shared_kind = dims
    size = tokens * hidden * ITEMSIZES[dtype]
    tables = expert_sizes(hidden, width, kind) * experts, expert_sizes(hidden, wide, shared_kind)
    return "i", size, 8 * 13, 2 * experts * hidden, 4 * experts, "f", *tables, (size, dtype)


DESCRIBE = (
    *(describe_linear, describe_experts, describe_rms_norm),
    *(describe_dequantize, describe_quantize, describe_mla_decode),
    *(describe_mla_project, describe_route, describe_moe),
)


def address_of(value) -> int:
    return ctypes.addressof(value) if isinstance(value, ctypes.Array) else value


def block(address: int, size: int) -> bytes:
    return struct.pack("<q", size) + ctypes.string_at(address, size)


def record(file: Path, monkeypatch) -> int:
    """Write every operator's calls of the C functions, and what the baseline kernels answer; returns how many."""
    calls = []

    def call(function: str, *arguments, real=_native.call):
        if function not in FUNCTIONS:
            return real(function, *arguments)
        number = FUNCTIONS.index(function)
        parts, writes = [], []
        for value, what in zip(arguments, DESCRIBE[number](*arguments), strict=True):
            if value is None:
                parts.append(struct.pack("<q", 4))
            elif what == "i":
                parts.append(struct.pack("<qq", 0, value))
            elif what == "f":
                parts.append(struct.pack("<qd", 1, value))
            elif isinstance(what, list):
                places = (ctypes.c_int64 * len(what)).from_address(address_of(value))
                entries = [
                    struct.pack("<qq", -1, place) if size < 0 else block(place, size if place else 0)
                    for place, size in zip(places, what, strict=True)
                ]
                parts.append(struct.pack("<qq", 5, len(what)) + b"".join(entries))
            elif isinstance(what, tuple):
                writes.append((len(parts), value, *what))
                parts.append(b"")
            else:
                parts.append(struct.pack("<q", 2) + block(address_of(value), what))
        real(function, *arguments)
        for place, address, size, dtype in writes:
            parts[place] = struct.pack("<qqq", 3, size, dtype) + ctypes.string_at(address, size)
        calls.append(struct.pack("<qq", number, len(parts)) + b"".join(parts))

    monkeypatch.setattr(_native, "call", call)
    kept = []
    with use_backend("cpu:baseline"):
        for tokens, hidden, width in ((1, 150, 70), (2, 129, 33), (3, 64, 191), (5, 200, 128), (20, 65, 131)):
            run(every_call(tokens, hidden, width, kept=kept))
        # denormals, and as many weights as several threads share
        run(every_call(2, 150, 70, 1e-40, kept=kept))
        run(every_call(1, 500, 700, kept=kept))
        run(every_call(40, 300, 200, kept=kept))
    calls.append(calls.pop(0))  # a call whose last argument is a result comes last
    file.write_bytes(b"".join(calls))
    return len(calls)


def build(compiler, out: Path, *flags) -> Path:
    command = [compiler, "-std=gnu11", *flags, TESTS / "engine_harness.c", *SOURCES, "-o", out, "-lm", "-lpthread"]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def play(*command) -> str:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.returncode, done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout


STRICT = ("-O2", "-g", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror")


@needs_gcc
def test_played_back_here(tmp_path, monkeypatch):
    """With sanitizers, on every instruction set; and the harness sees what is wrong."""
    calls = record(tmp_path / "calls", monkeypatch)
    sanitizers = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    harness = build(GCC, tmp_path / "harness", *STRICT, *sanitizers)
    levels = _native.instruction_sets()
    assert f"best {levels[-1]}, threads 1, {calls * len(levels)} calls, 0 failures" in play(
        harness, tmp_path / "calls"
    )
    data = bytearray((tmp_path / "calls").read_bytes())
    data[-2] ^= 0x40  # in the last call's result
    (tmp_path / "calls").write_bytes(data)
    with pytest.raises(AssertionError, match="off by"):
        play(harness, tmp_path / "calls")


@pytest.mark.skipif(None in (CROSS_GCC, QEMU_ARM), reason="no compiler or emulator for aarch64")
@pytest.mark.parametrize("flags", [(), ("-fsanitize=undefined", "-fno-sanitize-recover=all")], ids=["O2", "ubsan"])
def test_aarch64(tmp_path, monkeypatch, flags):
    calls = record(tmp_path / "calls", monkeypatch)
    harness = build(CROSS_GCC, tmp_path / "harness", *STRICT, *flags)
    out = play(QEMU_ARM, "-L", "/usr/aarch64-linux-gnu", harness, tmp_path / "calls")
    assert f"best neon, threads 1, {calls} calls, 0 failures" in out


@needs_gcc
@pytest.mark.skipif(QEMU_X86 is None, reason="no emulator for x86-64")
@pytest.mark.parametrize("cpu, best", [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_older_processors(tmp_path, monkeypatch, cpu, best):
    """An instruction that the processor lacks would end the harness."""
    record(tmp_path / "calls", monkeypatch)
    harness = build(GCC, tmp_path / "harness", *STRICT, "-static")
    out = play(QEMU_X86, "-cpu", cpu, harness, tmp_path / "calls")
    assert f"best {best}, threads 1" in out and ", 0 failures" in out


# Sanitizers under the tests of the operators.


def libraries() -> list[str]:
    names = ("libasan.so", "libubsan.so")
    return [
        subprocess.run([GCC, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in names
    ]


@needs_gcc
def test_sanitizers(tmp_path):
    """No byte outside of torch's tensors is touched, and nothing relied on that C leaves undefined."""
    if not all(os.path.isabs(library) for library in libraries()):
        pytest.skip("gcc has no sanitizers here")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "modeling_deepseek_moe", tmp_path / "modeling_deepseek_moe", ignore=ignored)
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"CFLAGS": flags, "LDFLAGS": flags},
    )
    [library] = (tmp_path / "modeling_deepseek_moe" / "ops").glob("*.so")
    assert b"__asan_" in library.read_bytes(), done.stdout + done.stderr
    environment |= {"LD_PRELOAD": " ".join(libraries()), "ASAN_OPTIONS": "detect_leaks=0"}
    others = ("build", "compile", "native", "processes")  # which start processes of their own
    files = [file for file in sorted(TESTS.glob("test_engine*.py")) if not file.stem.endswith(others)]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-c", ROOT / "pyproject.toml", *files]
    done = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "skipped" not in done.stdout
