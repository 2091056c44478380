"""The Triton kernels compiled for cards that are not here: what ptxas and the disassembler say of them.

    python tests/gpu/aot.py show [NAME] [--cards 80 90]   compile and print
    python tests/gpu/aot.py write [NAME]                  compile what changed into the tables, unless it became worse

A file ``specs_NAME.py`` next to this one says which kernels (``specs(card)``), ``aot_NAME.json`` what was found.
"""

import argparse
import ast
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CARDS = (80, 89, 90, 120)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB of shared memory that a block may have
SLACK = 1.02  # of instructions a byte, which another release of Triton may add
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")
LOADS = ("LDG", "UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class Spec:
    """A kernel as it is compiled for one card.

    Attributes:
        types: of its arguments that are no constants, ``"*bf16"``, ``"i32"``.
        weight_bytes: of weights (of cached keys, of values cast) that a block takes in one step of the loop with most loads, each
            counted once where several blocks read it; 0: instructions a byte tell nothing of it.
        is_loop: else a block takes these bytes once, by all of its instructions.
        aligned: arguments besides pointers that are multiples of 16.
    """

    name: str
    kernel: object
    types: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int
    weight_bytes: int = 0
    aligned: tuple[str, ...] = field(default=())
    is_loop: bool = True

    def source(self) -> str:
        """Of what is compiled: the kernel and what it calls, comments and docstrings apart, and the constants."""
        parts = sorted(_sources(self.kernel).items())
        options = sorted(map(str, (*self.types.items(), *self.constants.items())))
        text = repr((parts, options, self.warps, self.stages, self.weight_bytes, self.aligned))
        text += "" if self.is_loop else " once"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def compile(self, card: int):
        names = self.kernel.arg_names
        types = {name: self.types.get(name, "constexpr") for name in names}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        divisible = [i for i, name in enumerate(names) if types[name][0] == "*" or name in self.aligned]
        attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
        source = ASTSource(self.kernel, types, constants, attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def _sources(kernel, found: dict | None = None) -> dict[str, str]:
    """Of a kernel and those that it calls, by name."""
    found = {} if found is None else found
    tree = ast.parse(kernel.src)
    body = tree.body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant):
        body.pop(0)
    found[kernel.fn.__name__] = ast.dump(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            called = kernel.fn.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = getattr(kernel.fn.__globals__.get(node.value.id), node.attr, None)
        else:
            continue
        own = isinstance(called, triton.JITFunction) and called.fn.__module__.startswith("modeling_deepseek_moe")
        if own and called.fn.__name__ not in found:
            _sources(called, found)
    return found


def report(spec: Spec, card: int) -> dict[str, object]:
    """``registers``, ``spills`` (instructions), ``shared`` (bytes), and ``per_byte``: instructions a byte of weights."""
    compiled = spec.compile(card)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        "shared": compiled.metadata.shared,
    }
    if spec.weight_bytes:
        bodies = loops(assembly) if spec.is_loop else [every(assembly)]
        body = max(bodies, key=lambda body: sum(body[op] for op in body if op.startswith(LOADS)))
        found["per_byte"] = round(32 * spec.warps * sum(body.values()) / spec.weight_bytes, 2)
    return {"source": spec.source(), **found}


def loops(assembly: str) -> Iterator[Counter]:
    """The instructions of each loop's body, by name."""
    labels, instructions = {}, []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L_x_\d+|\.L_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    for end, (name, rest) in enumerate(instructions):
        target = re.search(r"\(?(\.L_x?_?\d+)\)?", rest)
        start = labels.get(target[1]) if target and name.startswith("BRA") else None
        if start is not None and start <= end:
            yield Counter(name for name, _ in instructions[start : end + 1])


def every(assembly: str) -> Counter:
    """All instructions, by name, but those that fill the end."""
    found = (INSTRUCTION.match(line) for line in assembly.splitlines())
    return Counter(match[1] for match in found if match and match[1] != "NOP")


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def names() -> list[str]:
    return sorted(path.stem.removeprefix("specs_") for path in FOLDER.glob("specs_*.py"))


def specs(name: str, card: int) -> list[Spec]:
    return importlib.import_module(f"gpu.specs_{name}").specs(card)


def table(name: str) -> dict[str, dict[str, dict]]:
    """What was found: by kernel and by card, as text."""
    path = FOLDER / f"aot_{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def faults(found: Mapping, recorded: Mapping | None, card: int) -> list[str]:
    """What is wrong with a compiled kernel, on its own and next to what was recorded."""
    wrong = [f"{found['spills']} spills"] if found["spills"] else []
    if found["shared"] > SHARED[card] << 10:
        wrong.append(f"{found['shared']} bytes of shared memory, SM{card} has {SHARED[card]} KiB")
    before = (recorded or {}).get("per_byte")
    if before is not None and found.get("per_byte", 0) > SLACK * before:
        wrong.append(f"{found['per_byte']} instructions a byte, were {before}")
    return wrong


def show(name: str, card: int, found: Mapping) -> None:
    print(f"{name:36} SM{card:<4}" + "  ".join(f"{k} {v}" for k, v in found.items() if k != "source"), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("show", "write"))
    parser.add_argument("names", nargs="*", default=names())
    parser.add_argument("--cards", nargs="*", type=int, default=CARDS)
    options, worse = parser.parse_args(), False
    for name in options.names:
        recorded, fresh = table(name), {}
        for card in options.cards:
            for spec in specs(name, card):
                before = recorded.get(spec.name, {}).get(str(card))
                known = options.what == "write" and before is not None and before["source"] == spec.source()
                found = before if known else report(spec, card)
                if not known:
                    show(spec.name, card, found)
                for wrong in faults(found, before, card):
                    worse = True
                    print(f"  {spec.name} SM{card}: {wrong}")
                fresh.setdefault(spec.name, {})[str(card)] = found
        if options.what == "write" and not worse:
            (FOLDER / f"aot_{name}.json").write_text(json.dumps(fresh, indent=1) + "\n")
    return int(worse)


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    sys.exit(main())
