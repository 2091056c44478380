"""Streaming where things go wrong around it: threads, forks, exits, kernels, disks, guesses, budgets."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import answer_of_fork
from releases import SHAPES, same_bits, write_release
from test_streaming import PROMPT, SLOT, generate, layer, load, logits, threads
from transformers.utils import logging

from modeling_deepseek_moe import CheckpointError, Machine
from modeling_deepseek_moe.streaming import ahead, cache, memory
from modeling_deepseek_moe.streaming import model as streaming_model
from modeling_deepseek_moe.streaming import threads as reading
from modeling_deepseek_moe.streaming.reader import Reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream-faults") / "release"
    write_release(folder, SHAPES["v3-mtp"](), fp8=True, shards=3)
    return folder


@pytest.fixture
def mapped(folder):
    return load(folder)


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_do_not_start(folder, mapped, monkeypatch, started):
    """One is enough; without any the caller is told, and the next call may find one."""
    model, expected = load(folder, 5 * SLOT), logits(mapped)
    start, count = threading.Thread.start, []

    def refuse(thread):
        if thread.name == reading.THREAD_NAME:
            count.append(thread)
            if len(count) > started:
                raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        if started:
            assert same_bits(logits(model), expected)
        else:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    logits(model)
    assert len(count) > started
    assert same_bits(logits(model), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_threads_of_a_forked_process_share_one_cache(folder, monkeypatch):
    model = load(folder, 5 * SLOT)
    expected = logits(model)
    start = cache.ExpertCache._start

    def answer() -> bytes:
        starts, found = [], []

        def slow(one):
            starts.append(one)
            time.sleep(0.1)
            start(one)

        cache.ExpertCache._start = slow

        def work():
            torch.set_num_threads(1)
            found.append(same_bits(logits(model), expected))

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        return b"one cache" if len(starts) == 1 and found == [True, True] else b"not so"

    assert answer_of_fork(answer) == b"one cache"


def test_a_read_left_behind_that_fails_when_it_is_wanted(folder, monkeypatch):
    """It fills memory that another expert waits for; no one orders it a second time, so its error is told."""
    model = load(folder, 2 * SLOT)
    experts = layer(model).stream.cache
    go, read = threading.Event(), Reader.read

    def slow(self, run, memory):
        go.wait(30)
        if ".experts.9." in run.infos[0].name:
            raise CheckpointError("the disk is gone")
        read(self, run, memory)

    monkeypatch.setattr(Reader, "read", slow)
    waits = []

    def interrupt(self, reads):
        waits.append(reads)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reading.ReadQueue, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(experts.serve(0, [8, 9]))
    assert len(waits) == 1
    threading.Timer(0.2, go.set).start()
    with pytest.raises(CheckpointError, match="the disk is gone"):
        list(experts.serve(0, [3, 9]))
    monkeypatch.undo()
    assert [slot.key for group in experts.serve(0, [3, 9]) for slot in group] == [(0, 3), (0, 9)]


def test_an_interrupt_while_waiting(folder, mapped, monkeypatch):
    model, wait, calls = load(folder, 4 * SLOT), reading.ReadQueue.wait, []

    def once(self, reads):
        calls.append(reads)
        if len(calls) == 3:
            raise KeyboardInterrupt
        wait(self, reads)

    monkeypatch.setattr(reading.ReadQueue, "wait", once)
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    assert generate(model) == generate(mapped)


@pytest.mark.parametrize("how", ["None", "another"])
def test_memory_goes_with_its_budget(folder, how):
    """At once: two budgets' worth of it may be more than there is."""
    gc.collect()
    before = threads()
    model = load(folder, 6 * SLOT)
    held = weakref.ref(layer(model).stream.cache.memory._map)
    serve = layer(model).stream.cache.serve(0, [1, 2, 3])
    next(serve)  # reads are under way
    serve.close()
    del serve
    gc.disable()
    try:
        model.set_expert_memory(None if how == "None" else 4 * SLOT)
        deadline = time.monotonic() + 10
        while (held() is not None or threads() > before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_process_that_ends_while_reading(folder):
    """Without a word, and soon."""
    script = (
        "import sys, torch, modeling_deepseek_moe, transformers\n"
        "from modeling_deepseek_moe.streaming.reader import Reader\n"
        "import time\n"
        "read = Reader.read\n"
        "Reader.read = lambda self, run, memory: (time.sleep(0.05), read(self, run, memory))\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"model.set_expert_memory({9 * SLOT})\n"
        "serve = model.model.layers[1].mlp.experts.stream.cache.serve(0, list(range(16)))\n"
        "next(serve)\n"
        "print('ends')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, folder],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.returncode == 0 and result.stdout == "ends\n", result.stderr
    assert "Exception" not in result.stderr and "Error" not in result.stderr


def test_kernels_that_know_no_huge_pages(folder, mapped, monkeypatch):
    monkeypatch.setattr(memory, "HUGE_PAGES", 9999)
    monkeypatch.setattr(memory, "_WIPE_ON_FORK", 9998)
    assert same_bits(logits(load(folder, 5 * SLOT)), logits(mapped))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no memory file system")
def test_files_in_memory(folder, mapped, tmp_path):
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        copy = shutil.copytree(folder, Path(place) / "release")
        model = load(copy, 5 * SLOT)
        assert same_bits(logits(model), logits(mapped))
        assert model.expert_stats().direct_io is not None


def test_other_weights_are_tried_again_after_an_error(folder, mapped, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_moe.streaming.resident.SMALL", 1000)
    model = load(folder, 5 * SLOT, "auto")
    files, weight = layer(model).files, model.lm_head.weight
    with monkeypatch.context() as patch:

        def fail(descriptor, buffers, offset):
            raise OSError(5, "Input/output error")

        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            logits(model)
        assert files.find(weight)
    assert same_bits(logits(model), logits(load(folder, dtype="auto")))
    assert files.find(weight) is None


@pytest.mark.parametrize("slots", [2, 3, 5, 9])
def test_every_expert_wanted_is_a_hit_or_a_miss(folder, mapped, monkeypatch, slots):
    """With memory so small that what was read ahead must make room again, and guesses without bounds."""
    monkeypatch.setattr(ahead, "LEAST_GUESSES", 0)
    monkeypatch.setattr(ahead, "MIN_PRECISION", -1.0)
    monkeypatch.setattr(cache, "WASTE", 1.0)
    model, wanted = load(folder, slots * SLOT), []
    serve = layer(model).stream.cache.serve

    def count(number, experts, *rest):
        wanted.append(len(experts))
        return serve(number, experts, *rest)

    monkeypatch.setattr(layer(model).stream.cache, "serve", count)
    for i in range(30):
        ids = PROMPT[:, i : i + 1 + i % 4]
        assert same_bits(logits(model, ids), logits(mapped, ids))
    stats = model.expert_stats()
    assert stats.hits + stats.misses == sum(wanted) and stats.hits >= 0
    assert stats.bytes_prefetched and 0 <= stats.prefetch_accuracy <= 1


def test_a_router_whose_weights_are_not_at_hand(folder):
    model = load(folder, 5 * SLOT)
    predictor, hidden = layer(model).stream._predictor, torch.randn(1, 64)
    assert len(predictor.rank(hidden)) == 4
    predictor.gate.to("meta")
    assert predictor.rank(hidden) == []


@pytest.mark.slow
def test_compiles_with_a_break(folder, mapped):
    model = load(folder, 5 * SLOT)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(PROMPT).logits
    assert same_bits(found, logits(mapped))
    assert model.expert_stats().misses


@pytest.mark.parametrize("budget", [1e6, np.int64(1_000_000), "1 MB", "1mb"])
def test_budgets_as_they_are_written(folder, budget):
    assert load(folder, budget).expert_stats().budget_bytes == 1_000_000


def test_more_than_is_available_is_told(folder, monkeypatch, caplog):
    logging.enable_propagation()
    monkeypatch.setattr(streaming_model, "probe_machine", lambda measure: Machine(10**9, 500_000, 1, None))
    model = load(folder)
    assert "the system may end this process" not in caplog.text
    model.set_expert_memory("400KB")
    assert "the system may end this process" not in caplog.text
    model.set_expert_memory("8GB")  # of which the experts take a part
    assert "the system may end this process" in caplog.text
