"""The table of docs/gpu.md is what was compiled, and its shares follow from it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rooflines():
    spec = importlib.util.spec_from_file_location("gpu_rooflines", ROOT / "benchmarks" / "gpu_rooflines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_files(rooflines):
    text = rooflines.PAGE.read_text(encoding="utf-8")
    assert rooflines.page(text) == text, "run `python benchmarks/gpu_rooflines.py`"
    lines = rooflines.lines()
    assert len(lines) == len(rooflines.ROWS) + 2 and all(line in text for line in lines)
    for kind in ("attention", "linear layers in FP8", "cast", "many rows"):
        assert any(kind in line for line in lines)


@pytest.mark.parametrize("missing", ("BEGIN", "END"))
def test_a_page_without_a_place_is_left_alone(rooflines, missing):
    text = rooflines.PAGE.read_text(encoding="utf-8").replace(getattr(rooflines, missing), "")
    with pytest.raises(ValueError, match=r"gpu\.md: found .*no <!-- "):
        rooflines.page(text)


def test_every_kernel_with_a_count_for_one_token_has_a_row(rooflines):
    """But those that differ from one of the table by their shape alone."""
    shown = {(row.file, row.kernel) for row in rooflines.ROWS}
    for file, kernels in rooflines.tables().items():
        for kernel, cards in kernels.items():
            counted = any("per_byte" in found for found in cards.values())
            if counted and kernel.endswith((" slots", " 1", " none", "cast_tiles", "logits bf16")):
                assert (file, kernel) in shown, kernel


def test_shares_of_bandwidth(rooflines):
    card = rooflines.Card("", 80, processors=100, clock=1.0, bandwidth=2.0, bf16=100, fp8=200, least=0.5)
    assert card.of_bandwidth(12.8) == pytest.approx((0.25, 0.5))  # 12.8e12 lanes a second, 25.6e12 wanted
    assert card.of_bandwidth(3.2) == (1.0, 1.0)
    # 100e12 operations take a second, 12.8e12 instructions too
    assert card.of_tensor_cores(6.4e12, 100e12, 100) == pytest.approx((1.0, 1.0))
    assert card.of_tensor_cores(25.6e12, 100e12, 100) == pytest.approx((0.25, 0.5))


@pytest.mark.parametrize("place", range(4))
def test_cards_are_those_of_data_sheets(rooflines, place):
    """fp32 rates of the sheets, from the same processors and clocks: two operations a lane, on SM80 of half the lanes."""
    card, teraflops = rooflines.CARDS[place], (19.5, 82.6, 61.8, 104.8)[place]
    lanes = rooflines.LANES // 2 if card.sm == 80 else rooflines.LANES
    assert 2 * card.processors * lanes * card.clock / 1e3 == pytest.approx(teraflops, rel=0.01)
