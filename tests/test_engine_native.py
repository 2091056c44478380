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
from typing import NamedTuple

import pytest
from engine_calls import every_call, run
from engine_cases import needs_engine

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops import _native, _structs

pytestmark = [needs_engine, pytest.mark.long]

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SOURCES = sorted((ROOT / "modeling_deepseek_moe" / "ops" / "csrc").glob("*.c"))
GCC, CROSS_GCC = shutil.which("gcc"), shutil.which("aarch64-linux-gnu-gcc")
QEMU_ARM, QEMU_X86 = shutil.which("qemu-aarch64"), shutil.which("qemu-x86_64")
needs_gcc = pytest.mark.skipif(GCC is None, reason="gcc is not installed")

# Recording. What each argument of a function is, after the instruction set and the threads: "i" or "f" (a number),
# a number of bytes that are read, (bytes, dtype) that are written (dtype -1: to the last bit), or a `Memory`: what is
# read and points to other memory.
FUNCTIONS = ("dsm_linear", "dsm_experts", "dsm_rms_norm", "dsm_dequantize", "dsm_quantize", "dsm_mla_decode")
FUNCTIONS += (
    "dsm_mla_project",
    "dsm_route",
    "dsm_moe",
    "dsm_dequantize_four_bit",
    "dsm_index",
    "dsm_sparse_attention",
)
ITEMSIZES = {code: dtype.itemsize for dtype, code in _native.DTYPES.items()}
EXACT = -1


class Memory(NamedTuple):
    """Bytes at an address, and by their place in it what the pointers there lead to."""

    address: int
    size: int
    pointers: dict[int, "Memory"] = {}

    def packed(self) -> bytes:
        parts = [struct.pack("<q", self.size), ctypes.string_at(self.address, self.size)]
        parts.append(struct.pack("<q", len(self.pointers)))
        for place, memory in self.pointers.items():
            parts += struct.pack("<q", place), memory.packed()
        return b"".join(parts)


def blocks(rows, columns):
    return 4 * math.ceil(rows / 128) * math.ceil(columns / 128)


def memory(given, **sizes) -> Memory:
    """A struct, with the bytes, or the memory, that each of its pointers leads to; those that are null lead nowhere."""
    pointers = {}
    for name, size in sizes.items():
        address, place = getattr(given, name), getattr(type(given), name).offset
        if isinstance(address, ctypes.Structure):
            pointers |= {place + inner: of for inner, of in size.pointers.items()}
        elif address:
            pointers[place] = size if isinstance(size, Memory) else Memory(address, size)
    return Memory(ctypes.addressof(given), ctypes.sizeof(given), pointers)


def code_bytes(dtype: int, count: int) -> int:
    return count // 2 if dtype not in ITEMSIZES else count * ITEMSIZES[dtype]


def scale_memory(address, dtype: int, kind: int, rows: int, columns: int) -> "Memory | int":
    """Of FP8's scales, or of four-bit codes': in fp32, bf16 or E8M0, or a record of nested ones."""
    if dtype in ITEMSIZES:
        return blocks(rows, columns)
    groups = rows * columns // (32 if kind in (1, 8) else 64)
    if kind == 9 and address:
        nested = _structs.Nested.from_address(address)
        return memory(nested, codes=groups, absmax=4 * -(-groups // 256), table=4 * 256)
    return groups * {0: 4, 1: 2, 8: 1, 9: 0}[kind]


def matrix(given) -> Memory:
    what = given.dtype, given.scale_kind, given.rows, given.cols
    return memory(given, data=code_bytes(given.dtype, given.rows * given.cols), scale=scale_memory(given.scale, *what))


def expert_table(given, hidden) -> Memory:
    codes, what = code_bytes(given.dtype, hidden * given.width), (given.dtype, given.scale_kind)
    shapes = {"gate": (given.width, hidden), "up": (given.width, hidden), "down": (hidden, given.width)}
    size, pointers = ctypes.sizeof(_structs.Expert), {}
    for place in range(0, given.count * size, size):
        entry = _structs.Expert.from_address(given.table + place)
        sizes = dict.fromkeys(shapes, codes)
        for name, shape in shapes.items():
            sizes[f"{name}_scale"] = scale_memory(getattr(entry, f"{name}_scale"), *what, *shape)
        pointers |= {place + inner: of for inner, of in memory(entry, **sizes).pointers.items()}
    return memory(given, table=Memory(given.table or 0, given.count * size, pointers))


def describe_linear(dtype, x, tokens, weight, bias, y):
    size, rows, columns = ITEMSIZES[dtype], weight.rows, weight.cols
    return "i", tokens * columns * size, "i", matrix(weight), 4 * rows, (tokens * rows * size, dtype)


def describe_experts(dtype, x, tokens, hidden, indices, weights, top_k, given, sums, out):
    x_bytes, slots = tokens * hidden * ITEMSIZES[dtype], tokens * top_k
    results = (4 * tokens * hidden, 0), (x_bytes, dtype)
    return "i", x_bytes, "i", "i", 8 * slots, 4 * slots, "i", expert_table(given, hidden), *results


def describe_rms_norm(dtype, x, tokens, n, norm, out):
    size = ITEMSIZES[dtype]
    return "i", tokens * n * size, "i", "i", memory(norm, weight=n * size), (tokens * n * size, dtype)


def describe_dequantize(codes, scale, rows, columns, out, dtype):
    return rows * columns, blocks(rows, columns), "i", "i", (rows * columns * ITEMSIZES[dtype], EXACT), "i"


def describe_quantize(x, dtype, rows, columns, power_of_two, codes, scale):
    size = rows * columns
    return size * ITEMSIZES[dtype], "i", "i", "i", "i", (size, EXACT), (blocks(rows, columns), EXACT)


def describe_mla_decode(dtype, batch, tokens, length, shape, queries, cache, mask, weight, scaling, out):
    size, heads, rope, rank = ITEMSIZES[dtype], shape.num_heads, shape.qk_rope_head_dim, shape.kv_lora_rank
    nope = batch * tokens * heads * shape.qk_nope_head_dim * size
    read = memory(queries, nope=nope, pe=batch * tokens * heads * rope * size)
    cached = memory(cache, c_kv=batch * length * rank * size, k_pe=batch * length * rope * size)
    parts = memory(shape), read, cached, memory(mask, values=4 * batch * tokens * length), matrix(weight)
    return "i", "i", "i", "i", *parts, "f", (batch * tokens * heads * shape.v_head_dim * size, dtype)


def describe_index(dtype, given, visible, topk, out):
    size, queries = ITEMSIZES[dtype], given.batch * given.tokens
    parts = {"queries": queries * given.heads * given.width * size, "weights": 4 * queries * given.heads}
    keys = given.batch * given.length * given.width * size
    seen = (given.batch if visible.batch else 1) * given.tokens * given.length * {10: 1}.get(visible.dtype, 4)
    out = (4 * queries * topk, EXACT)
    return "i", memory(given, **parts, keys=keys), memory(visible, values=seen), "i", out


def describe_sparse_attention(
    dtype, batch, tokens, length, shape, queries, cache, indices, count, weight, scaling, out
):
    size, heads, rope, rank = ITEMSIZES[dtype], shape.num_heads, shape.qk_rope_head_dim, shape.kv_lora_rank
    nope = batch * tokens * heads * shape.qk_nope_head_dim * size
    read = memory(queries, nope=nope, pe=batch * tokens * heads * rope * size)
    cached = memory(cache, c_kv=batch * length * rank * size, k_pe=batch * length * rope * size)
    rows = 4 * batch * tokens * count
    written = (batch * tokens * heads * shape.v_head_dim * size, dtype)
    return "i", "i", "i", "i", memory(shape), read, cached, rows, "i", matrix(weight), "f", written


def describe_mla_project(dtype, x, tokens, shape, weights, cos, sin, *results):
    size, rope, rank = ITEMSIZES[dtype], shape.qk_rope_head_dim, shape.kv_lora_rank
    parts = {name: matrix(getattr(weights, name)) for name in ("q_a", "q_b", "kv_a")}
    parts["q_a_norm"] = memory(weights.q_a_norm, weight=weights.q_a.rows * size)
    parts["kv_a_norm"] = memory(weights.kv_a_norm, weight=rank * size)
    widths = shape.num_heads * (shape.qk_nope_head_dim + rope), rank, rope
    outputs, angles = [(tokens * width * size, dtype) for width in widths], 4 * tokens * rope // 2
    return (
        "i",
        tokens * weights.kv_a.cols * size,
        "i",
        memory(shape),
        memory(weights, **parts),
        angles,
        angles,
        *outputs,
    )


def describe_route(logits, tokens, experts, bias, how, *results):
    slots = tokens * how.top_k
    return 4 * tokens * experts, "i", "i", 4 * experts, memory(how), (4 * slots, 0), (8 * slots, EXACT)


def describe_moe(dtype, x, tokens, hidden, layer, out):
    size = tokens * hidden * ITEMSIZES[dtype]
    parts = {"gate": matrix(layer.gate), "bias": 4 * layer.gate.rows}
    parts |= {name: expert_table(getattr(layer, name), hidden) for name in ("routed", "shared")}
    return "i", size, "i", "i", memory(layer, **parts), (size, dtype)


def describe_dequantize_four_bit(weight, out, dtype):
    return matrix(weight), (weight.rows * weight.cols * ITEMSIZES[dtype], EXACT), "i"


DESCRIBE = (
    *(describe_linear, describe_experts, describe_rms_norm),
    *(describe_dequantize, describe_quantize, describe_mla_decode),
    *(describe_mla_project, describe_route, describe_moe, describe_dequantize_four_bit),
    *(describe_index, describe_sparse_attention),
)


def record(file: Path, monkeypatch) -> int:
    """Write every operator's calls of the C functions, and what the baseline kernels answer; returns how many."""
    calls = []

    def call(function: str, *arguments, real=_native.call):
        if function not in FUNCTIONS:
            return real(function, *arguments)
        number = FUNCTIONS.index(function)
        given, arguments = arguments, [getattr(value, "_obj", value) for value in arguments]  # what `byref` refers to
        parts, writes = [], []
        for value, what in zip(arguments, DESCRIBE[number](*arguments), strict=True):
            if value is None:
                parts.append(struct.pack("<q", 4))
            elif what == "i":
                parts.append(struct.pack("<qq", 0, value))
            elif what == "f":
                parts.append(struct.pack("<qd", 1, value))
            elif isinstance(what, Memory):
                parts.append(struct.pack("<q", 2) + what.packed())
            elif isinstance(what, tuple):  # a `Memory` is one too
                writes.append((len(parts), value, *what))
                parts.append(b"")
            else:
                parts.append(struct.pack("<q", 2) + Memory(value, what).packed())
        real(function, *given)
        for place, address, size, dtype in writes:
            parts[place] = struct.pack("<qqq", 3, size, dtype) + ctypes.string_at(address, size)
        calls.append(struct.pack("<qq", number, len(parts)) + b"".join(parts))

    monkeypatch.setattr(_native, "call", call)
    kept = []
    with use_backend("cpu:baseline"):
        for tokens, hidden, width in ((1, 150, 70), (2, 129, 33), (3, 64, 191), (5, 200, 128), (20, 65, 131)):
            run(every_call(tokens, hidden, width, kept=kept, kinds=_structs.FOUR_BIT))
        # denormals, and as many weights as several threads share
        run(every_call(2, 150, 70, 1e-40, kept=kept, kinds=_structs.FOUR_BIT))
        run(every_call(1, 500, 700, kept=kept, kinds=_structs.FOUR_BIT))
        run(every_call(40, 300, 200, kept=kept, kinds=_structs.FOUR_BIT))
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
    files.append(TESTS / "test_four_bit_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-c", ROOT / "pyproject.toml", *files]
    done = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "skipped" not in done.stdout
