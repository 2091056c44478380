"""Trials of libraries by functions of this file: what is a verdict, what is none, and where nothing is tried. No card, no library."""

import contextlib
from functools import partial

import pytest
import torch
from gpu import libraries
from gpu.libraries import BF16, install
from torch.utils.checkpoint import checkpoint

from modeling_deepseek_moe.ops import _liger, _trials, _triton
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.ops.absorbed_attention import flash_attention as latents
from modeling_deepseek_moe.ops.rms_norm import reference, rms_norm

LIGER = {"liger-kernel": "0.8.5"}


@pytest.fixture(autouse=True)
def told(monkeypatch):
    yield install(monkeypatch, LIGER, liger_kernel__ops=libraries.LIGER)
    _trials.forget()


def nothing() -> None:
    return None


def asked(theirs=nothing, own=nothing, found=lambda: [torch.ones(3)], wanted=lambda: [torch.ones(3)]) -> str | None:
    """Why Liger is not taken for an operation of that shape."""
    x = torch.empty(2, dtype=BF16)
    return _trials.trials().reason("liger", "SwiGLU", x, (2,), lambda: _trials.Trial(found, wanted, 0.0, theirs, own))


def raises(error: Exception):
    raise error


@pytest.mark.parametrize("place", ("own", "wanted"))
def test_what_this_package_raises_is_not_the_librarys(told, place):
    with pytest.raises(ValueError, match="experts: found factors"):
        asked(**{place: partial(raises, ValueError("experts: found factors"))})
    assert told == [] and asked() is None


def test_what_the_library_raises_as_it_is_timed_is_its_refusal(told):
    assert asked(theirs=partial(raises, ValueError("no such tile"))) == "raised ValueError: no such tile"
    assert len(told) == 1


@pytest.mark.parametrize("place", ("theirs", "own", "found", "wanted"))
def test_memory_that_ends_is_no_verdict(told, place):
    """Until it has ended three times: each time costs what was kept for others."""
    ends = {place: partial(raises, torch.OutOfMemoryError("CUDA out of memory"))}
    with torch.no_grad():
        assert asked(**ends) == "found no memory left to be tried with" and told == []
        assert asked() is None and len(told) == 1
        _trials.forget()
        told.clear()
        for _ in range(_trials.TRIES):
            assert told == [] and "no memory" in asked(**ends)
        assert "no memory" in asked() and len(told) == 1 and "no memory" in told[0]


def test_memory_that_ends_is_a_verdict_in_training(told):
    """A checkpoint computes the same once more, and has to take the same."""
    assert "no memory" in asked(found=partial(raises, torch.OutOfMemoryError("CUDA out of memory")))
    assert "no memory" in asked() and len(told) == 1


def test_memory_that_ends_as_the_first_kernel_starts_is_raised(monkeypatch):
    _triton._cannot_start.cache_clear()
    error = RuntimeError("Triton Error [CUDA]: out of memory")
    monkeypatch.setattr(torch.cuda, "device", lambda index: raises(error))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            _triton._cannot_start(0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: raises(RuntimeError("no ptxas")))
    assert "no ptxas" in _triton._cannot_start(0)
    _triton._cannot_start.cache_clear()


def test_nothing_is_taken_by_the_clock_where_runs_have_to_agree(told, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "wants the same kernels in each run" in asked() and "wants the same kernels" in asked()
    assert len(told) == 1 and told[0].startswith("Liger (liger-kernel 0.8.5) is not taken by the clock")
    with use_backend("liger"):
        assert asked() is None


@pytest.mark.parametrize("processes", (1, 2))
def test_nothing_is_taken_by_the_clock_where_processes_have_to_agree(told, monkeypatch, processes):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    reason = asked()
    assert reason is None if processes == 1 else "in a job of several processes" in reason
    with use_backend("liger"):
        assert asked() is None


def test_what_was_tried_before_is_not_taken_either(told, monkeypatch):
    assert asked() is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert asked() == _trials.SAME_KERNELS


def test_a_library_without_gradients_is_tried_without(told, monkeypatch):
    libraries.be_a_card(monkeypatch)
    x, weight = torch.randn(3, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            _liger.unsuitable("RMSNorm", torch.mul, torch.mul, x, weight)
        assert f"64, 4, {enabled}, {enabled} on cpu" in told.pop()


def test_latents_of_nearly_as_many_rows_share_a_verdict(monkeypatch):
    told = install(monkeypatch, {"flash-attn-3": "3.0.0"}, flash_attn_interface=libraries.FLASH_3)
    for batch in (5, 6, 7, 8):
        query, c_kv, k_pe = (
            torch.empty(batch, *shape, dtype=BF16) for shape in ((5, 1, 128), (1, 77, 512), (1, 77, 64))
        )
        assert latents.unsuitable(90, query, c_kv, k_pe, False, 0.07, nothing, nothing) is None
    assert len(told) == 1 and "attention over latents torch.bfloat16, 5, 8, 128 on cpu" in told[0]


def test_times_are_taken_in_turns_after_warming_up(monkeypatch):
    order, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            order.append("waits")

        def elapsed_time(self, end):
            return end.at - self.at

    def call(name, takes):
        order.append(name)
        now[0] += takes

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    found = _trials.times(torch.device("cuda"), partial(call, "theirs", 0.25), partial(call, "own", 0.5))
    assert found == [250.0, 500.0]
    assert order == [*["theirs", "own"] * (2 + _trials.TURNS), "waits"]  # else a card waits for each start


def test_a_trial_within_a_checkpoint_leaves_no_trace(told, monkeypatch):
    libraries.be_a_card(monkeypatch)
    x, weight = torch.randn(3, 5, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    found = checkpoint(rms_norm, x, weight, 1e-6, use_reentrant=False)
    wanted = reference.rms_norm(x, weight, 1e-6)
    above = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, (x, weight), above)
    torch.testing.assert_close(torch.autograd.grad(found, (x, weight), above), gradients)
    assert len(told) == 1 and "Liger (liger-kernel 0.8.5): 1 µs" in told[0]
