"""Draws docs/architecture.svg from the layering table of tests/test_layering.py: `python docs/architecture.py`.

What changes in the table changes the picture; a test compares it with the file.
"""

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each part of the package is about.
FAMILIES = {
    "files": "checkpoint weights release release_names origin loading resuming saving quantizer resizing offloaded hub inspection anatomy planning "
    "planning_drafts planning_sparse training_memory training_scale training_speed bnb templates",
    "mathematics": "layers rope indexer masks cross_entropy attention_chunks attention sparse_attention layer_context moe block mtp decoding "
    "objective modeling config layer_types families named_models field_checks tokens chat_template training indexer_loss",
    "machine": "ops formats quantized engine streaming hybrid cache paged machine cgroups distributed device_memory moving",
    "around": "_version compat terminal pages adapters registration tiny __init__ cli eval conversion",
}
PATHS = {
    "a token": ("modeling", "block", "attention", "moe", "ops"),
    "a weight": ("checkpoint", "release", "loading", "quantizer", "quantized", "ops"),
}
COLOURS = {"a token": "#4d6bfe", "a weight": "#d97706"}
FILLS = {"files": "#fef3c7", "mathematics": "#dbeafe", "machine": "#dcfce7", "around": "#f1f5f9"}
LEFT, WIDTH, HEIGHT, GAP, ACROSS, TOP = 116, 142, 40, 8, 5, 64
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2937}.head{font-weight:600}.small{font-size:9px;fill:#6b7280}"
    ".badge{font-size:10px;font-weight:700;fill:#fff}rect{stroke:#cbd5e1}"
)


def layers() -> list[str]:
    """``LAYERS`` of `tests/layers.py`, lowest first; the command line and the folders above it last."""
    tree = ast.parse((ROOT / "tests" / "layers.py").read_text(encoding="utf-8"))
    [table] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["LAYERS"]
    ]
    return [*ast.literal_eval(table), "conversion", "eval", "cli"]


def strips() -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Neighbours of the table that belong to one family, lowest first: its name, and the parts with their modules."""
    family = {part: name for name, parts in FAMILIES.items() for part in parts.split()}
    parts: dict[str, list[str]] = {}
    for name in layers():
        part, _, module = name.partition(".")
        parts.setdefault(part, [])
        if module and "*" not in module:
            parts[part].append(module)
    found: list[tuple[str, list]] = []
    for part, modules in parts.items():
        if not found or found[-1][0] != family[part] or len(found[-1][1]) == ACROSS:
            found.append((family[part], []))
        found[-1][1].append((part, modules))
    return found


def box(x: int, y: int, part: str, modules: list[str], fill: str) -> list[str]:
    out = [f'<rect x="{x}" y="{y}" width="{WIDTH - GAP}" height="{HEIGHT - GAP}" rx="5" fill="{fill}"/>']
    out.append(f'<text x="{x + 8}" y="{y + (13 if modules else 20)}">{escape(part)}</text>')
    text = " ".join(modules)
    text = text if len(text) < 28 else f"{text[:26].rsplit(' ', 1)[0]} …"
    if modules:
        out.append(f'<text class="small" x="{x + 8}" y="{y + 26}">{escape(text)}</text>')
    at = x + WIDTH - GAP - 10
    for name, path in PATHS.items():
        for number in (index for index, step in enumerate(path, 1) if step == part):
            out.append(f'<circle cx="{at}" cy="{y + 8}" r="8" fill="{COLOURS[name]}"/>')
            out.append(f'<text class="badge" x="{at}" y="{y + 12}" text-anchor="middle">{number}</text>')
            at -= 18
    return out


def draw() -> str:
    """The picture as SVG."""
    rows = strips()[::-1]
    height, width = TOP + HEIGHT * len(rows) + 24, LEFT + WIDTH * ACROSS + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>The modules of modeling_deepseek_moe, each above what it may import</title>",
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#ffffff" stroke="none"/>',
    ]
    for number, (name, path) in enumerate(PATHS.items()):
        y = 22 + 20 * number
        out.append(f'<circle cx="18" cy="{y - 4}" r="8" fill="{COLOURS[name]}"/>')
        out.append(f'<text x="32" y="{y}">{name}: {" → ".join(path)}</text>')
    for row, (family, parts) in enumerate(rows):
        y = TOP + HEIGHT * row
        out.append(f'<text class="head" x="10" y="{y + 20}">{family}</text>')
        for column, (part, modules) in enumerate(parts):
            out += box(LEFT + WIDTH * column, y, part, modules, FILLS[family])
    foot = "A module imports only what stands below it, or to its left. tests/test_layering.py holds this."
    out.append(f'<text class="small" x="10" y="{height - 8}">{foot}</text></svg>')
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    file = Path(__file__).with_suffix(".svg")
    file.write_text(draw(), encoding="utf-8")
    print(f"wrote {file}")
