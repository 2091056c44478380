"""Writes `walks.md`: the way of a token and of a weight through the code, as a profiler sees it.

Run it after a change of the way; a test holds the page to the code.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME

PACKAGE = Path(dsm.__file__).parent
PAGE = Path(__file__).with_name("walks.md")
READ, MAPPED, PLACED, CALLED = "read_header", "MappedFiles.address", "Experts.of", "call"
# from the engine's entry to the multiplication of FP8 codes for one token, on AVX-512 BF16
ENGINE = (
    *("step.c dsm_step", "moe.c dsm_moe", "experts.c dsm_experts", "experts.c run", "experts.c down"),
    *(
        "few_tokens_avx512_bf16.h dsm_bf16_gemv",
        "turns_avx512.h gemv_in_turns",
        "few_tokens_avx512_bf16.h read_rows",
    ),
    *("few_tokens_avx512_bf16.h turn_fp8", "few_tokens_avx512_bf16.h add_block", "avx512_bf16.h decode64"),
)


def is_ours(code: CodeType) -> bool:
    inside = code.co_filename.startswith(f"{PACKAGE}/") and not code.co_name.startswith("<")
    return inside and Path(code.co_filename).name != "compat.py"  # which differs from one transformers to another


def place(code: CodeType) -> tuple[str, str]:
    """File and qualified name."""
    return str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname


def chain(frame: FrameType | None) -> list[CodeType]:
    """The package's functions that are being run, the outermost first."""
    found: list[CodeType] = []
    while frame is not None:
        found.insert(0, frame.f_code)
        frame = frame.f_back
    return list(dict.fromkeys(filter(is_ours, found)))


def walk(action: Callable, stops: tuple[str, ...] = ()) -> tuple[list[CodeType], dict[str, list[CodeType]]]:
    """The package's functions in the order in which ``action`` enters them first, and the way to each of ``stops``."""
    entered: dict[CodeType, None] = {}
    ways: dict[str, list[CodeType]] = {}

    def look(frame: FrameType, event: str, _) -> None:
        if event == "call" and is_ours(frame.f_code):
            entered.setdefault(frame.f_code)
            if frame.f_code.co_qualname in stops:
                ways.setdefault(frame.f_code.co_qualname, chain(frame))

    sys.setprofile(look)
    try:
        action()
    finally:
        sys.setprofile(None)
    return list(entered), ways


def purpose(code: CodeType) -> str:
    """The first line of a function's docstring, or of its class's."""
    module = sys.modules[
        f"{dsm.__name__}." + place(code)[0].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    ]
    found = owner = module
    for name in code.co_qualname.split("."):
        owner, found = found, getattr(found, name, None)
        if found is None:  # a function within a function
            return ""
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    text = inspect.cleandoc(found.__doc__ or (owner.__doc__ if inspect.isclass(owner) else None) or "")
    return text.split("\n")[0].replace("|", "\\|")


def decoder() -> Callable:
    """A function that takes one decoding step of the tiny FP8 model after a prompt."""
    model = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint()).eval()
    with torch.no_grad():
        cache = model(torch.arange(5, 45)[None], use_cache=True)[CACHE_NAME]

    def step() -> None:
        with torch.no_grad():
            model(torch.tensor([[5]]), **{CACHE_NAME: cache})

    return step


def token() -> list[CodeType]:
    """One decoding step, neither the first, which makes the plan, nor the second, which makes what is around it."""
    step = decoder()
    step()
    step()
    return walk(step)[0]


def weight() -> dict[str, list[CodeType]]:
    """The ways to where a routed expert's weight is read from, mapped, looked up and handed to C."""
    made: list[Callable] = []
    loading = walk(lambda: made.append(decoder()), (READ, MAPPED))[1]
    return loading | walk(made[0], (PLACED, CALLED))[1]


def rows(codes: list[CodeType]) -> Iterator[str]:
    yield "| | file | function | |\n|---|---|---|---|"
    for number, code in enumerate(codes, 1):
        file, name = place(code)
        yield f"| {number} | `{file}` | `{name}` | {purpose(code)} |"


def page() -> str:
    steps, ways = token(), weight()
    hops = dict.fromkeys(code for way in ways.values() for code in way)
    titles = {
        READ: "Loading reads where every tensor lies",
        MAPPED: "and makes the modules that know where their experts are mapped",
        PLACED: "The first decoding step after a prompt puts the addresses into the plan",
        CALLED: "which each step hands to the engine",
    }
    parts = [
        "# Two walks through the code",
        "Written by `python docs/walks.py` from a run of the tiny FP8 model on a CPU; a test holds it to the code.",
        f"## A token, from `input_ids` to logits: {len(steps)} functions",
        "In the order in which one decoding step enters them first. From the id to the logits it is one call of the engine.",
        "\n".join(rows(steps)),
        f"## An expert's weight, from its file to the multiplication: {len(hops) + len(ENGINE)} functions",
    ]
    for stop, title in titles.items():
        parts += [f"{title}:", "\n".join(rows(ways[stop]))]
    parts += [
        "In C (`ops/csrc/`), with one token on AVX-512 BF16:",
        "| | file | function |\n|---|---|---|\n"
        + "\n".join("| {} | `{}` | `{}` |".format(number, *line.split()) for number, line in enumerate(ENGINE, 1)),
    ]
    return re.sub(r" +$", "", "\n\n".join(parts), flags=re.M) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
