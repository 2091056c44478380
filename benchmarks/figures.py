"""Draws the charts of the README and the docs from the result files: `python benchmarks/figures.py`.

A machine is shown with what was measured on it and is in ``results/``; a test holds that the files are what this draws.
"""

import json
import math
import statistics
from pathlib import Path

from drawing import Bar, Grid, Spread, draw, draw_spreads

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
# The result file of each machine, and what it is: "AMD EPYC" is all that a virtual machine says of itself.
MACHINES = {
    "cpu-xeon": "Intel Xeon, Emerald Rapids (AMX)",
    "cpu": "AMD EPYC, Zen 4 (AVX-512)",
    "cpu-zen3": "AMD EPYC, Zen 3 (AVX2)",
}
SHORT, LONG, PROMPT = "decoding at 128 tokens", "decoding at 8192 tokens", "prefill of 512 tokens"
SPEED = {
    SHORT: "Decoding after 128 tokens",
    LONG: "Decoding after 8,192 tokens",
    PROMPT: "Reading a prompt of 512 tokens",
}
OURS, PLAIN, LLAMA = "this package", "transformers", "llama.cpp"
CONTESTANTS = {
    "FP8, this package": OURS,
    "transformers bf16": PLAIN,
    "llama.cpp q8": LLAMA,
    "llama.cpp lite-q8_0": LLAMA,
}
CASES = {"next to llama.cpp, 128 tokens": SHORT, "next to llama.cpp, 8192 tokens": LONG}
LINEAR, EXPERTS, MODEL = (
    "An FP8 linear layer, one row",
    "6 of 64 experts, one token",
    "A model, decoding at 128 tokens",
)
# Result files of models in four bits by machine and instruction set, and the columns of docs/four-bit.md
FOUR_BIT = {
    "Zen 4, AVX-512": "cpu",
    "Xeon, AMX": "cpu-xeon",
    "Xeon, AVX-512 without bf16": "cpu-avx512",
    "Xeon, AVX2": "cpu-avx2",
    "Zen 3, AVX2": "cpu-zen3",
}
FOUR_BIT_COLUMNS = (
    *("FP8, head bf16", "FP8, head FP8", "INT4, head INT4", "NF4, head NF4"),
    *("llama.cpp q4_0", "llama.cpp q4_k_m", "llama.cpp q8_0"),
)
# Student's t of a two-sided 95 % interval, by the number of runs
T = {4: 3.182, 8: 2.365}
LEARNING_RATES = ("4.2e-4", "1e-3")  # the first is DeepSeek-V2-Lite's
TOLERATED = 0.25  # per cent: what DeepSeek-V3's report gives as FP8's cost


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def speeds(result: dict) -> dict[str, dict[str, float]]:
    """Tokens per second by case and contestant, with all threads; llama.cpp where it was measured."""
    found: dict[str, dict[str, float]] = {case: {} for case in SPEED}
    for row in [*result["e2e"]["rows"], *result.get("next to llama.cpp", {}).get("rows", ())]:
        case, name = CASES.get(row["case"], row["case"]), CONTESTANTS.get(row["contestant"])
        if case in found and name is not None:
            found[case].setdefault(name, row["tokens_s"])  # of this package: the run in turns with transformers
    return found


def four_bit_lines() -> list[str]:
    """The table of docs/four-bit.md: tokens per second, and the share of the bandwidth where it was measured."""
    lines = []
    for isa, file in FOUR_BIT.items():
        cases: dict[str, dict[str, str]] = {}
        for row in results(file)["e2e_four_bit"]["rows"]:
            share = f", {row['share_of_read']:.0%}".replace("%", " %") if "share_of_read" in row else ""
            if "tokens_s" in row:
                cases.setdefault(row["case"], {})[row["contestant"]] = f"{row['tokens_s']:.1f}{share}"
        for case, found in cases.items():
            lines.append(f"| {isa}: {case} | {' | '.join(found.get(name, '') for name in FOUR_BIT_COLUMNS)} |")
    return lines


def speed_chart() -> Grid:
    cells, ratios = {}, {case: [] for case in SPEED}
    for file, machine in MACHINES.items():
        for case, contestants in speeds(results(file)).items():
            ratio = contestants[OURS] / contestants[PLAIN]
            ratios[case].append(ratio)
            bars = [Bar(OURS, contestants[OURS], "ours", _rate(contestants[OURS]), f"{_ratio(ratio)} ×")]
            if LLAMA in contestants:
                bars.append(Bar(LLAMA, contestants[LLAMA], "other", _rate(contestants[LLAMA])))
            bars.append(Bar(PLAIN, contestants[PLAIN], "third", _rate(contestants[PLAIN])))
            cells[machine, SPEED[case]] = tuple(bars)
    short, long = (f"{_ratio(min(ratios[case]))} to {_ratio(max(ratios[case]))}" for case in (SHORT, LONG))
    return Grid(
        title=f"Two CPU cores decode DeepSeek {short} times as fast as transformers, {long} times at 8k",
        subtitle="Tokens per second: more is better. × compares with transformers on the same machine.",
        columns=tuple(SPEED.values()),
        rows=tuple(MACHINES.values()),
        cells=cells,
        note="A model of 2.25B parameters in DeepSeek-V2-Lite's dimensions, one conversation, two virtual cores: FP8 in this "
        "package, bf16 in transformers 5.23, Q8_0 in llama.cpp, of which decoding was measured.",
    )


def bandwidth_chart() -> Grid:
    cells, shares = {}, []
    for file, machine in MACHINES.items():
        result = results(file)
        for column, part, case in (
            (LINEAR, "ops", "FP8 linear 4096×7168, 1 row"),
            (EXPERTS, "experts", "64 experts 2048×1408, top-6, 1 token"),
            (MODEL, "e2e", SHORT),
        ):
            rows = [row for row in result[part]["rows"] if row["case"] == case and "share_of_read" in row]
            rows = [row for row in rows if row["threads"] == max(row["threads"] for row in rows)]
            plain = max(row["share_of_read"] for row in rows if not row["contestant"].startswith("FP8"))
            best = [row for row in rows if row["contestant"].startswith("FP8")][-1]["share_of_read"]  # the widest set
            with_avx2 = [row["share_of_read"] for row in rows if row["contestant"] == "FP8 avx2"]
            bars = [Bar(OURS, best, "ours", _percent(best))]
            if with_avx2 and with_avx2[0] != best:
                bars.append(Bar("with AVX2 only", with_avx2[0], "other", _percent(with_avx2[0])))
            bars.append(Bar("torch, bf16", plain, "third", _percent(plain)))
            cells[machine, column] = tuple(bars)
            shares.append(best)
    return Grid(
        title=f"FP8 weights are read at {100 * min(shares):.0f} to {_percent(max(shares))} of the memory bandwidth",
        subtitle="Share of what the fastest reader reached in the same seconds. 100 % is the limit of decoding.",
        columns=(LINEAR, EXPERTS, MODEL),
        rows=tuple(MACHINES.values()),
        cells=cells,
        note="The linear layer is 4096 × 7168, the experts are 2048 × 1408, the model is that of the speeds. torch, bf16: the "
        "best of torch's and transformers' own ways; bf16 weights are twice the bytes.",
    )


def training_chart() -> str:
    runs = results("fp8-training")["subwords"]
    groups = []
    for rate in LEARNING_RATES:
        losses = runs[rate]
        pairs = (
            ("FP8 – bf16", "fp8", "bf16"),
            ("FP8, bf16 Wgrad – bf16", "fp8-wgrad-bf16", "bf16"),
            ("bf16 – fp32", "bf16", "fp32"),
        )
        spreads = [spread(title, losses[one], losses[other]) for title, one, other in pairs]
        groups.append((f"At {rate}, {len(losses['bf16'])} starts each", spreads))
    [cost, *_] = groups[0][1]
    return draw_spreads(
        f"FP8 training costs {cost.mean:.1f}\u00a0±\u00a0{cost.mean - cost.low:.1f}\u00a0% of the loss",
        "Difference of the mean loss of the last 200 of 1,000 steps: a small dot is an initialisation, the large "
        "one their mean, the line its 95 % interval. By learning rate; 4.2e-4 is DeepSeek-V2-Lite's.",
        groups,
        TOLERATED,
        f"Shaded: ± {TOLERATED} %, what DeepSeek-V3's report gives. tinyshakespeare in subwords, a model of width 128. "
        "benchmarks/results/fp8-training.json has every loss.",
    )


def spread(name: str, losses: list[float], against: list[float]) -> Spread:
    """Gaps in per cent of runs that began alike, their mean, and its 95 % interval by Student's t."""
    gaps = [100 * (one / other - 1) for one, other in zip(losses, against, strict=True)]
    mean = statistics.fmean(gaps)
    half = T[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Spread(name, tuple(gaps), mean, mean - half, mean + half)


def charts() -> dict[str, str]:
    """File name in ``docs/`` → SVG."""
    found = {"fp8-training.svg": training_chart()}
    for name, grid in (("speed", speed_chart()), ("bandwidth", bandwidth_chart())):
        found |= {f"{name}.svg": draw(grid), f"{name}-narrow.svg": draw(grid, narrow=True)}
    return found


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def main() -> None:
    for name, text in charts().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
