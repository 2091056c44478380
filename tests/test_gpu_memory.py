"""Memory of a device that ends in the middle of something: nothing stays there, and what there was before works on."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_mapped_moves import load, logits, write_fp8, write_nf4

from modeling_deepseek_moe.device_memory import accelerators, give_back, has_own_memory
from modeling_deepseek_moe.moving import _Before

CASES = Path(__file__).with_name("exhausted_cases.py")


@pytest.mark.kernels
def test_on_a_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(CASES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, check=False, capture_output=True, text=True, cwd=CASES.parent, env=environment)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert "failed" not in found.stdout and "skipped" not in found.stdout


def test_what_bitsandbytes_moves_in_place_is_put_back(tmp_path):
    write_nf4(tmp_path / "release")
    model = load(tmp_path / "release")
    wanted, before = logits(model), _Before(model)
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    assert states
    for state in states:
        state.to("meta")
    assert all(state.absmax.is_meta for state in states)
    before.restore()
    assert not any(state.absmax.is_meta or state.code.is_meta for state in states)
    assert torch.equal(logits(model), wanted)


def test_a_move_that_fails_leaves_streams_as_they_were(tmp_path):
    """The one thing besides tensors that a move ends: the reading of experts as they are needed."""
    write_fp8(tmp_path / "release")
    model = load(tmp_path / "release")
    model.set_expert_memory("1MB")
    wanted, streams = logits(model), [layer.mlp.experts.stream for layer in model.model.layers[1:]]
    before = _Before(model)
    for layer in model.model.layers[1:]:
        layer.mlp.experts.restack("cpu")
    before.restore()
    assert [layer.mlp.experts.stream for layer in model.model.layers[1:]] == streams
    assert torch.equal(logits(model), wanted)
    for layer in model.model.layers[1:]:
        layer.mlp.experts.restack("cpu")
    before.close_streams()
    assert not any(stream.cache._closing.alive for stream in streams)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_streams_of_a_part_that_is_moved_end_with_the_last_of_them(tmp_path):
    """The layers that are left go on streaming; what reads for none is closed."""
    write_fp8(tmp_path / "release")
    model = load(tmp_path / "release")
    model.set_expert_memory("1MB")
    wanted, layers = logits(model), model.model.layers[1:]
    closing = layers[0].mlp.experts.stream.cache._closing
    for layer in layers:
        assert closing.alive
        layer.mlp.experts.restack("cpu")
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    gc.collect()
    assert not closing.alive


def test_the_report_of_a_failure_raises_none_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    both = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert accelerators("auto") == accelerators("balanced") == accelerators(None) == both
    assert accelerators({"": 1, "lm_head": "cpu"}) == accelerators("cuda:1") == both[1:]

    def fails():
        raise torch.AcceleratorError("CUDA error: out of memory\n")

    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    assert give_back("cuda:1") == "how much is free on cuda:1 is not known (CUDA error: out of memory)"


def test_memory_of_its_own(monkeypatch):
    assert not has_own_memory(torch.device("mps")) and has_own_memory(torch.device("xpu"))
    for is_integrated in (False, True):
        properties = SimpleNamespace(is_integrated=is_integrated)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert has_own_memory(torch.device("cuda")) is not is_integrated
