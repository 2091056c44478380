"""Checkpoint folders with something wrong in them, by the thousand: each loads, or is refused with file or field named.

A seed makes one folder: a small release with one to three mutations of its config, index, headers, scales or files. All
doors are then tried in a forked process: a hang, a signal and an error that names nothing are findings.
``python tests/fuzz_folders.py FIRST COUNT`` prints those of a range of seeds.
"""

import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from damages import header_of, with_header
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm

SECONDS = 60  # a seed takes one; on a machine that does other things, a few
INDEX = "model.safetensors.index.json"
REFUSALS = (dsm.CheckpointError, ValueError, OSError)
HOSTILE = (
    *(None, True, False, 0, -1, 1, 3, 127, 2**31 - 1, 2**40, 10**30, 0.5, -0.0, 1e400, float("nan"), "", "nonsense"),
    *("\u0000", "\ud800", "../../etc", [], [1], [[]], [None], {}, {"a": {}}, "9" * 5000),
)


class Outcome(NamedTuple):
    """``error`` is ``None`` where the door opened; ``is_named`` whether it says which file or field is meant."""

    seed: int
    mutations: tuple[str, ...]
    door: str
    error: str | None
    is_named: bool


# ---- what is done to a folder ----


def regular(file: Path) -> Path:
    """The file, if it is one that reading comes to the end of."""
    if not file.is_file() or file.is_symlink():
        raise FileNotFoundError(file)
    return file


def config(folder: Path, pick: random.Random) -> str:
    """One field, at the top or in one of the dictionaries, gets another value, goes, or is new."""
    fields = json.loads(regular(folder / "config.json").read_text())
    target = fields
    inner = [key for key, value in fields.items() if isinstance(value, dict)]
    where = ""
    if inner and pick.random() < 0.3:
        where = pick.choice(inner)
        target = fields[where]
    new = ("sliding_window", "quantization_config", "rope_scaling", "rope_parameters", "auto_map", "layer_types")
    key = pick.choice([*target, *new])
    value = pick.choice(HOSTILE)
    if pick.random() < 0.15:
        target.pop(key, None)
        value = "gone"
    else:
        target[key] = value
    (folder / "config.json").write_text(json.dumps(fields))
    return f"config {where}.{key}={str(value)[:20]!r}"


def text(folder: Path, pick: random.Random) -> str:
    """The bytes of config or index: cut, one changed, a BOM before them, nested without end, of another encoding."""
    file = regular(folder / pick.choice(("config.json", INDEX)))
    data = bytearray(file.read_bytes())
    how = pick.choice(("cut", "byte", "bom", "deep", "utf-16", "null", "number", "twice"))
    if how == "cut":
        data = data[: pick.randrange(len(data))]
    elif how == "byte":
        data[pick.randrange(len(data))] = pick.randrange(256)
    elif how == "bom":
        data = b"\xef\xbb\xbf" + data
    elif how == "deep":
        data = b"[" * 100_000
    elif how == "utf-16":
        data = data.decode().encode("utf-16")
    elif how in ("null", "number"):
        data = b"null" if how == "null" else b"1" * 10_000
    else:
        data = bytes(data) * 2
    file.write_bytes(data)
    return f"text {file.name} {how}"


def index(folder: Path, pick: random.Random) -> str:
    """An entry of the index, or its tables."""
    fields = json.loads(regular(folder / INDEX).read_text())
    names = list(fields["weight_map"])
    how = pick.choice(("value", "gone", "name", "table", "metadata", "extra"))
    name, value = pick.choice(names), pick.choice((*HOSTILE, "/dev/zero", "config.json", "..", "no-such.safetensors"))
    if how == "value":
        fields["weight_map"][name] = value
    elif how == "gone":
        del fields["weight_map"][name]
    elif how == "name":
        fields["weight_map"][str(value)] = fields["weight_map"].pop(name)
    elif how == "extra":
        fields["weight_map"][f"model.layers.{value}.mlp.gate.weight"] = fields["weight_map"][name]
    else:
        fields["weight_map" if how == "table" else "metadata"] = value
    (folder / INDEX).write_text(json.dumps(fields))
    return f"index {how} {name} {str(value)[:20]!r}"


def header(folder: Path, pick: random.Random) -> str:
    """An entry of a shard's header: dtype, shape, offsets, its name, or the same name twice."""
    file = regular(pick.choice(sorted(folder.glob("*.safetensors"))))
    entries, data = header_of(file.read_bytes())
    name = pick.choice([name for name in entries if name != "__metadata__"])
    field, value = pick.choice(("dtype", "shape", "data_offsets", "name", "twice", "entry", "metadata")), None
    if field == "name":
        many = "9" * 5000
        names = ("model.layers.99.x", "", "\u0000", "\ud800", name.upper(), f"{name}_scale_inv", "a" * 5000)
        experts = (f"model.layers.{many}.x", f"model.layers.1.mlp.experts.{many}.gate_proj.weight")
        value = pick.choice((*names, *experts))
        entries[value] = entries.pop(name)
    elif field == "twice":
        raw = json.dumps(entries)[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}}}"
        file.write_bytes(with_header(raw.encode(), data))
        return f"header {file.name} {name} twice"
    elif field in ("entry", "metadata"):
        value = pick.choice(HOSTILE)
        entries[name if field == "entry" else "__metadata__"] = value
    elif field == "dtype":
        value = pick.choice((*HOSTILE, "F32", "F64", "I8", "U8", "F8_E4M3", "F8_E8M0", "F8_E5M2", "BOOL", "F4"))
        entries[name]["dtype"] = value
    else:
        value = pick.choice((*HOSTILE, [0, 2**62], [10, 5], [-1, 4], [0, 0], [1, 2, 3], [2**63, 2**63]))
        entries[name][field] = value
    file.write_bytes(with_header(json.dumps(entries).encode(), data))
    return f"header {file.name} {name} {field} {str(value)[:20]!r}"


def scales(folder: Path, pick: random.Random) -> str:
    """The value, shape or dtype of one tensor of scales, or of a router's bias."""
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        entries, _ = header_of(regular(file).read_bytes())
        files |= {name: file for name in entries if name.endswith(("_scale_inv", "e_score_correction_bias"))}
    name = pick.choice(sorted(files))
    file = files[name]
    entries, data = header_of(file.read_bytes())
    start, end = entries[name]["data_offsets"]
    how = pick.choice(("nan", "inf", "zero", "negative", "tiny", "dtype", "shape", "gone"))
    if how == "dtype":
        entries[name] |= {"dtype": "BF16", "data_offsets": [start, start + (end - start) // 2]}
    elif how == "shape":
        entries[name]["shape"] = [*entries[name]["shape"], 1]
    elif how == "gone":
        del entries[name]
    else:
        value = {"nan": float("nan"), "inf": float("inf"), "zero": 0.0, "negative": -1.0, "tiny": 1e-45}[how]
        row = torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32).clone()
        row[pick.randrange(len(row))] = value
        data = data[:start] + row.numpy().tobytes() + data[end:]
    file.write_bytes(with_header(json.dumps(entries).encode(), data))
    return f"scales {file.name} {name} {how}"


def files(folder: Path, pick: random.Random) -> str:
    """A file becomes a folder, a pipe, a device, a loop of links, a git-lfs pointer; or is cut, or gone."""
    file = pick.choice([*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / INDEX])
    how = pick.choice(("gone", "empty", "cut", "folder", "pipe", "device", "loop", "pointer", "byte", "unreadable"))
    data = regular(file).read_bytes()
    file.unlink()
    if how == "empty":
        file.touch()
    elif how == "cut":
        file.write_bytes(data[: pick.randrange(len(data))])
    elif how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "device":
        file.symlink_to(pick.choice(("/dev/zero", "/dev/null", "/dev/full")))
    elif how in ("loop", "unreadable"):
        file.symlink_to(file.name if how == "loop" else "/proc/self/mem")
    elif how == "pointer":
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(data)}\n")
    elif how == "byte":
        place = pick.randrange(min(len(data), 4096))
        file.write_bytes(data[:place] + bytes([pick.randrange(256)]) + data[place + 1 :])
    return f"files {file.name} {how}"


MUTATIONS: tuple[Callable[[Path, random.Random], str], ...] = (
    config,
    config,
    text,
    index,
    header,
    header,
    scales,
    files,
)


def mutate(folder: Path, seed: int) -> tuple[str, ...]:
    """The mutations of a seed, each that still can be made after the ones before it."""
    pick, done = random.Random(seed), []
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        try:
            done.append(pick.choice(MUTATIONS)(folder, pick))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            continue  # an earlier one left nothing to mutate
    return tuple(done)


# ---- the doors ----


def is_known(file: Path) -> bool:
    try:
        fields = json.loads(regular(file).read_text())
        return fields["model_type"] == "deepseek_v3" and isinstance(fields.get("auto_map", {}), dict)
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return False


def use(folder: Path) -> None:
    # What transformers reads before it knows whose folder it is, it refuses in its own words.
    kind = AutoModelForCausalLM if is_known(folder / "config.json") else dsm.DeepseekV3ForCausalLM
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        model(torch.arange(3, 9)[None] % model.config.vocab_size)


def plan(folder: Path) -> None:
    machine = dsm.Machine(ram_bytes=1 << 34, ram_available=1 << 34, threads=1, bandwidth=None)
    dsm.make_plan(dsm.parameter_breakdown(dsm.read_config(folder)), machine, context=4096)


DOORS: dict[str, Callable[[Path], object]] = {
    "load": use,
    "inspect": dsm.inspect_checkpoint,
    "plan": lambda folder: dsm.make_plan(
        dsm.parameter_breakdown(dsm.read_config(folder)), dsm.probe_machine(measure=False), 64
    ),
}
FIELD = re.compile(r"\b[a-z]+(_[a-z0-9]+)+\b")


def is_named(error: BaseException, folder: Path) -> bool:
    """Whether a refusal is of a kind to be caught, and names a file of the folder or a field."""
    said = str(error)
    if "set_int_max_str_digits" in said:  # a word of Python's own, and no field
        said = said.replace("set_int_max_str_digits", "")
    return isinstance(error, REFUSALS) and (str(folder) in said or folder.name in said or bool(FIELD.search(said)))


def attempt(folder: Path, seed: int, mutations: tuple[str, ...]) -> Iterator[Outcome]:
    for name, door in DOORS.items():
        try:
            door(folder)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            yield Outcome(seed, mutations, name, said[:400], is_named(error, folder))
        else:
            yield Outcome(seed, mutations, name, None, True)


def base(folder: Path) -> Path:
    write_release(folder, SHAPES["v3-mtp"](), fp8=True, shards=3)
    return folder


def run(seeds: list[int], original: Path, scratch: Path, seconds: float = SECONDS) -> Iterator[Outcome]:
    """The outcomes of ``seeds``; a process that hangs or dies is one, and the next seed gets another process."""
    waiting = list(seeds)
    while waiting:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _serve(waiting, original, scratch, theirs)
        os.close(theirs)
        yield from _read(waiting, child, ours, seconds)
        os.close(ours)
        status = os.waitpid(child, 0)[1]
        if waiting:
            seed = waiting.pop(0)
            how = f"exit {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else f"signal {os.WTERMSIG(status)}"
            how = f"hang of {seconds:.0f} s" if how == f"signal {signal.SIGKILL:d}" else how
            folder = scratch / str(seed)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder)
            yield Outcome(seed, mutate(folder, seed), "?", how, False)


def _serve(seeds: list[int], original: Path, scratch: Path, pipe: int) -> None:
    """In the child: each seed's outcomes as a line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    code = 1
    try:
        for seed in seeds:
            folder = scratch / str(seed)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder)
            outcomes = list(attempt(folder, seed, mutate(folder, seed)))
            shutil.rmtree(folder, ignore_errors=True)
            os.write(pipe, json.dumps(outcomes).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _read(waiting: list[int], child: int, pipe: int, seconds: float) -> Iterator[Outcome]:
    rest, deadline = b"", time.monotonic() + seconds
    while waiting:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            return
        part = os.read(pipe, 1 << 20)
        if not part:
            return
        rest += part
        *lines, rest = rest.split(b"\n")
        for line in lines:
            waiting.pop(0)
            deadline = time.monotonic() + seconds
            for seed, mutations, *fields in json.loads(line):
                yield Outcome(seed, tuple(mutations), *fields)


def main() -> None:
    first, count = map(int, sys.argv[1:])
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        original = base(Path(scratch, "original"))
        for outcome in run(list(range(first, first + count)), original, Path(scratch)):
            kind = "opened" if outcome.error is None else "refused" if outcome.is_named else "FINDING"
            counts[f"{outcome.door} {kind}"] += 1
            if kind == "FINDING":
                print(outcome.seed, outcome.door, *outcome.mutations, "->", outcome.error, sep=" | ", flush=True)
    print(dict(sorted(counts.items())))


if __name__ == "__main__":
    main()
