"""`benchmarks/kimi.py` on a tiny model: releases of random codes that load, take the bytes that they should, and are saved as they were."""

import argparse
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def kimi(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_readers
    import kimi

    monkeypatch.setattr(cpu_readers.common, "beyond_caches", lambda least: 1 << 20)
    monkeypatch.setattr(kimi, "POOL", 4 << 20)
    return kimi


@pytest.mark.skipif(sys.platform != "linux", reason="bytes resident are read from /proc")
def test_a_tiny_model(kimi, tmp_path):
    options = argparse.Namespace(folder=tmp_path, quick=True, layers=1, experts=16, rounds=1)
    rows = kimi.measure(options)
    kimi.show(rows, options)
    assert {name: (row["other_tensors"], row["same_announcement"]) for name, row in rows.items()} == dict.fromkeys(
        ("FP8", "INT4", "INT4 throughout"), (0, True)
    )
    # pages are counted in whole, of three matrices an expert
    experts = [row["resident_per_expert_parameter"] for row in rows.values()]
    assert experts == pytest.approx([1, 0.5625, 0.5625], rel=0.05)
    # attention and shared experts in bf16 outweigh what few experts save here; none of it is left throughout
    assert rows["INT4 throughout"]["bytes_per_token"] < 0.6 * rows["FP8"]["bytes_per_token"]


def test_codes_that_are_too_large_are_named(kimi, tmp_path, monkeypatch):
    options = argparse.Namespace(folder=tmp_path, quick=True, layers=1, experts=8, rounds=1)
    form, ignored = kimi.CONTESTANTS["INT4 throughout"]
    config = kimi.config_of(options, form.quantization_config(ignored))
    monkeypatch.setattr(kimi, "POOL", config.vocab_size * config.hidden_size // 2 - 1)
    with pytest.raises(
        SystemExit, match=r"lm_head\.weight_packed: found 327,680 bytes of codes, wanted 327,679 at most"
    ):
        kimi.write_release(tmp_path / "one", config, form, ignored)


def test_bytes_that_changed_are_told(kimi, tmp_path, monkeypatch):
    options = argparse.Namespace(folder=tmp_path, quick=True, layers=1, experts=8, rounds=1)
    form, ignored = kimi.CONTESTANTS["INT4 throughout"]
    kimi.write_release(tmp_path / "one", kimi.config_of(options, form.quantization_config(ignored)), form, ignored)
    model, _ = kimi.load(tmp_path / "one")
    model.lm_head.weight.data[0, 0] ^= 1
    found = kimi.save(model, tmp_path / "one")
    assert found["others"] == ["lm_head.weight_packed"]
