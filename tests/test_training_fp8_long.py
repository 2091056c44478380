"""A thousand steps in FP8 compared with bf16 and fp32: the same weights, data and order (`pytest -m long`, an hour or two on two cores).

Two designs of one model of width 128. On subwords, at DeepSeek-V2-Lite's learning rate, FP8 stays on average over
initialisations within the 0.25 % of bf16, and of fp32, that the V3 report found on models of 16 and 230 billion parameters. On
bytes, at 1e-3 and where the loss is half as large, it does not: the bound there says only that it learns.
"""

from pathlib import Path

import pytest
from fp8_runs import ROW, ROWS, Design, mean_of_last, subwords, train_all

SEEDS = 8
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
needs_text = pytest.mark.skipif(not TEXT.exists(), reason=f"needs {TEXT.name}")


def hold(folder, design, tokens, seeds, bound):
    """On average over initialisations both recipes stay within ``bound`` of bf16 and of fp32, and bf16 within 0.25 % of fp32.

    One initialisation tells little: what runs part by, whatever they are rounded to, grows with the learning rate, from a tenth
    of a percent at 4.2e-4 to half a percent at 2e-3.
    """
    losses = train_all(folder, design, tokens, seeds)
    pairs = [("bf16", "fp32"), *((fp8, other) for fp8 in ("FP8", "FP8, Wgrad in bf16") for other in ("bf16", "fp32"))]
    means = {}
    for recipe, other in pairs:
        gaps = [mean_of_last(losses[seed, recipe]) / mean_of_last(losses[seed, other]) - 1 for seed in range(seeds)]
        means[recipe, other] = sum(gaps) / seeds
        listed = ", ".join(f"{gap:+.2%}" for gap in gaps)
        print(f"{recipe} compared with {other}: {means[recipe, other]:+.2%} ({listed})", flush=True)
    for (recipe, other), mean in means.items():
        assert abs(mean) < (0.0025 if recipe == "bf16" else bound), f"{recipe} compared with {other}: {mean:+.2%}"


@pytest.mark.long
@needs_text
def test_loss_gap_on_subwords(tmp_path):
    hold(tmp_path, Design(1024, 0.02, 4.2e-4), subwords(TEXT.read_text(), 1024), SEEDS, 0.0025)


@pytest.mark.long
@needs_text
def test_loss_gap_on_bytes(tmp_path):
    hold(tmp_path, Design(256, 0.05, 1e-3), list(TEXT.read_bytes()[: ROWS * ROW * 1000]), 1, 0.015)
