"""Every Triton kernel compiled ahead of time for four generations of cards, none of which is needed for it.

The tables `gpu/aot_*.json` hold registers, shared memory and instructions a byte, which may only become better. In the
ordinary run they are of these very sources, and one kernel of each is compiled; ``-m long`` compiles all.
"""

import importlib.util
from pathlib import Path

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")]
NAMES = sorted(path.stem.removeprefix("specs_") for path in Path(__file__).parent.glob("gpu/specs_*.py"))


@pytest.fixture(scope="module")
def aot():
    from gpu import aot

    return aot


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_of_these_sources(aot, name):
    recorded = aot.table(name)
    for card in aot.CARDS:
        for spec in aot.specs(name, card):
            found = recorded.get(spec.name, {}).get(str(card))
            stale = found is None or found["source"] != spec.source()
            assert not stale, f"{spec.name} changed: python tests/gpu/aot.py write {name}"
            assert not aot.faults(found, None, card), spec.name


@pytest.mark.parametrize("card", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_one_kernel_compiles_as_recorded(aot, name, card):
    spec = aot.specs(name, card)[0]
    assert not aot.faults(aot.report(spec, card), aot.table(name)[spec.name][str(card)], card)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_all_kernels_compile_as_recorded(aot, name):
    for card in aot.CARDS:
        for spec in aot.specs(name, card):
            wrong = aot.faults(aot.report(spec, card), aot.table(name)[spec.name][str(card)], card)
            assert not wrong, f"{spec.name} SM{card}: {wrong}"


def test_spills_too_much_memory_and_more_instructions_are_faults(aot):
    found = {"spills": 2, "shared": 100 << 10, "per_byte": 4.0}
    assert len(aot.faults(found, {"per_byte": 3.6}, 89)) == 3
    assert aot.faults({**found, "spills": 0}, {"per_byte": 4.0}, 90) == []
