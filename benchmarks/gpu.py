"""What a GPU does with this package, in under eight minutes: `python benchmarks/gpu.py [--budget SECONDS] [--out FOLDER]`.

Parts run in order, the most important first; each writes its JSON as it ends, so a run that is cut short leaves what it had.
A smaller budget drops parts from the bottom. A part that fails is recorded with its error, and the next one runs. At the end
charts are drawn of what there is; ``python benchmarks/gpu_plot.py FOLDER`` draws them of a run that was cut short.

On a machine without a network carry the wheel of transformers 5.23 or later (13 MB) and this package; huggingface_hub 1.33,
tokenizers 0.23.2, torch 2.11 and Triton 3.6 suffice. Where Triton is missing, the parts that need it say so.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

BUDGET = 470.0
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "huggingface_hub")


class Part(NamedTuple):
    """``seconds``: that it takes on an H100, compiling included. ``run`` takes the device and gives what goes into its file."""

    name: str
    seconds: float
    run: Callable[[torch.device], dict]


def fitting(parts: Sequence[Part], budget: float) -> list[Part]:
    """The first parts, as many as the budget has room for."""
    found, left = [], budget
    for part in parts:
        left -= part.seconds
        if left < 0:
            break
        found.append(part)
    return found


def run(parts: Sequence[Part], device: torch.device, folder: Path, budget: float) -> list[dict]:
    """Run the parts that fit, in order; each writes ``NN-name.json``. A part for which too little time is left is not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + budget, []
    for number, part in enumerate(fitting(parts, budget), 1):
        start = time.monotonic()
        if end - start < part.seconds:
            print(f"{part.name}: left out, {end - start:.0f} s are left of {part.seconds:.0f}", flush=True)
            break
        try:
            found = part.run(device)
        except Exception as error:  # whatever is wrong with one part, the next one is worth its time
            found = {"error": f"{type(error).__name__}: {error}"[:2000], "at": traceback.format_exc(limit=-3)}
        result = {"part": part.name, "seconds": round(time.monotonic() - start, 1), **found}
        (folder / f"{number:02}-{part.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def machine(device: torch.device) -> dict:
    """The card and the software, for every run's first file."""
    card = torch.cuda.get_device_properties(device)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found = {"card": card.name, "sm": f"{card.major}.{card.minor}", "processors": card.multi_processor_count}
    return {**found, "memory_GB": round(card.total_memory / 1e9, 1), "python": platform.python_version(), **versions}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; parts that do not fit are left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    parser.add_argument(
        "--plan", action="store_true", help="print the parts that the budget has room for; needs no GPU"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.plan:
        print("benchmarks/gpu.py: found no CUDA device, wanted one: nothing was measured", file=sys.stderr)
        return 2
    import gpu_parts
    import gpu_plot

    parts = [Part("machine", 1, machine), *(Part(*row) for row in gpu_parts.PARTS)]
    kept = fitting(parts, options.budget)
    if options.plan:
        for part in kept:
            print(f"{part.seconds:4.0f} s  {part.name}: {part.run.__doc__.splitlines()[0]}")
        print(
            f"{sum(part.seconds for part in kept):4.0f} s of {options.budget:.0f}; left out: {len(parts) - len(kept)}"
        )
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"parts: {', '.join(part.name for part in kept)}; left out: {len(parts) - len(kept)}", flush=True)
    results = run(parts, device, options.out, options.budget)
    for file in gpu_plot.write(results, options.out):
        print(file)
    failed = [result["part"] for result in results if "error" in result]
    print(f"{len(results)} parts in {options.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
