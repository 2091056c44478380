"""The charts of README and docs are what `benchmarks/figures.py` draws from the committed results, and say what those say."""

import importlib.util
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("drawing", None)


def words(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(TEXT)]


def test_the_files_are_what_is_drawn(figures):
    charts = figures.charts()
    assert len(charts) == 5
    for name, svg in charts.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == svg, "run `python benchmarks/figures.py`"


@pytest.mark.parametrize("name", ["speed.svg", "speed-narrow.svg"])
def test_every_speed_is_a_result(figures, name):
    found = words(figures.charts()[name])
    for file, machine in figures.MACHINES.items():
        assert machine in found
        rows = figures.results(file)["e2e"]["rows"]
        for case in figures.SPEED:
            [ours] = [row for row in rows if row["case"] == case and row["contestant"] == "FP8, this package"]
            [plain] = [row for row in rows if row["case"] == case and row["contestant"] == "transformers bf16"]
            ratio = plain["ms"] / ours["ms"]
            assert any(text.endswith(f" {ratio:.0f} ×") or text.endswith(f" {ratio:.1f} ×") for text in found), case
            assert any(text.split()[0] == f"{ours['tokens_s']:.0f}" for text in found)
    assert found.count("llama.cpp") == {"speed.svg": 3, "speed-narrow.svg": 6}[name]  # decoding, on each machine


def test_a_machine_without_llama_cpp_has_no_bar_of_it(figures):
    result = figures.results("cpu")
    del result["next to llama.cpp"]
    assert all(set(found) == {figures.OURS, figures.PLAIN} for found in figures.speeds(result).values())


def test_the_table_of_four_bits_is_the_results(figures):
    page = (ROOT / "docs" / "four-bit.md").read_text(encoding="utf-8").splitlines()
    lines = figures.four_bit_lines()
    assert len(lines) == 5 * len(figures.FOUR_BIT)
    assert [line for line in lines if line not in page] == [], "`benchmarks/figures.py`: four_bit_lines"


def test_an_interval_is_students(figures):
    drawn = figures.spread("", [101.0, 102.0, 103.0, 104.0], [100.0] * 4)
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert drawn.points == pytest.approx((1, 2, 3, 4))
    assert (drawn.mean, drawn.low, drawn.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_no_line_leaves_its_card(figures):
    """By the widest of the fonts: 12.4 px a letter of a title, 7.9 px else."""
    for name, svg in figures.charts().items():
        card = ElementTree.fromstring(svg)
        for element in card.iter(TEXT):
            text, kind = "".join(element.itertext()), element.get("class")
            width = len(text) * (12.4 if kind == "title" else 7.9) / (2 if "middle" in kind else 1)
            assert float(element.get("x")) + width <= float(card.get("width")), (name, text)
