"""Experts held in memory of a set size: the same bits as from the mapped files, whatever is held; and what goes wrong."""

import copy
import gc
import io
import os
import threading
import time

import pytest
import torch
from forks import answer_of_fork
from releases import SHAPES, same_bits, write_release
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from modeling_deepseek_moe import Machine, use_backend
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.streaming import ahead, cache, reader
from modeling_deepseek_moe.streaming import model as streaming_model
from modeling_deepseek_moe.streaming.threads import THREAD_NAME

PROMPT = torch.arange(3, 40)[None]
EXPERT = 3 * 32 * 64  # bytes of codes
SLOT = 3 * 3 * 4096  # at the least


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "release"
    write_release(folder, SHAPES["v3-mtp"](), fp8=True, shards=3)
    return folder


def load(folder, budget=None, dtype="float32"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if budget is not None:
        model.set_expert_memory(budget)
    return model


@pytest.fixture
def mapped(folder):
    return load(folder)


def logits(model, ids=PROMPT):
    with torch.no_grad():
        return model(ids).logits


def generate(model, ids=PROMPT, tokens=12):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None).tolist()


def layer(model, index=1) -> MappedExperts:
    return model.model.layers[index].mlp.experts


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("slots", [2, 3, 9, 20, 1000])
def test_same_bits_as_mapped(folder, dtype, slots, backend):
    mapped, streamed = load(folder, dtype=dtype), load(folder, slots * SLOT, dtype)
    with use_backend(backend):
        for ids in (PROMPT, PROMPT[:, :1], PROMPT.repeat(3, 1), PROMPT[:, :1].repeat(2, 1)):
            assert same_bits(logits(streamed, ids), logits(mapped, ids))
        assert generate(streamed) == generate(mapped)
        assert same_bits(logits(streamed), logits(mapped))


def test_mtp_layer_streams_too(folder, mapped):
    streamed = load(folder, 3 * SLOT)
    hidden = torch.randn(1, 5, 64)
    with torch.no_grad():
        expected, _ = mapped.mtp_logits(0, PROMPT[:, :5], hidden)
        found, _ = streamed.mtp_logits(0, PROMPT[:, :5], hidden)
    assert same_bits(found, expected)
    assert streamed.expert_stats().misses


@pytest.mark.parametrize("order", ["neighbours", "scattered"])
def test_reads_neighbours_in_one_go(folder, order):
    infos = list(layer(load(folder)).infos(5).values())
    if order == "scattered":
        infos = [info._replace(start=info.start + i * 9000, end=info.end + i * 9000) for i, info in enumerate(infos)]
    else:
        infos = [
            info._replace(file=infos[0].file, start=5000 + 2048 * i, end=7048 + 2048 * i)
            for i, info in enumerate(infos)
        ]
    runs = reader.plan_runs(infos)
    assert len(runs) == (1 if order == "neighbours" else 3)
    assert sum(run.nbytes for run in runs) <= reader.most_bytes(infos)
    for run in runs:
        assert run.start % 4096 == 0 and run.nbytes % 4096 == 0 and run.place % 4096 == 0
        for info in run.infos:
            assert run.start <= info.start and info.end <= run.start + run.nbytes
            assert run.place_of(info) == run.place + info.start - run.start


def test_a_second_prompt_reads_nothing_that_is_held(folder):
    model = load(folder, "100MB")
    first = logits(model)
    stats = model.expert_stats(reset=True)
    assert stats.misses and not stats.hits and stats.hit_rate == 0
    assert stats.bytes_read == stats.bytes_missed == stats.misses * EXPERT
    assert stats.tokens == PROMPT.numel() and stats.bytes_read_per_token == stats.bytes_read / stats.tokens
    assert stats.held_bytes <= stats.budget_bytes == 100_000_000
    assert stats.read_seconds > 0 and stats.stall_seconds > 0 and stats.direct_io is not None
    assert same_bits(logits(model), first)
    again = model.expert_stats()
    assert again.hits == stats.misses and again.misses == again.bytes_read == 0 and again.hit_rate == 1


def test_what_is_used_often_stays(folder):
    """With memory for all but a few experts of what a token wants, most of it is still found."""
    model = load(folder, 6 * SLOT)  # a token wants 4 experts in each of 2 layers
    for _ in range(4):
        logits(model, PROMPT[:, :1])
    model.expert_stats(reset=True)
    logits(model, PROMPT[:, :1])
    stats = model.expert_stats()
    assert stats.hits >= 4 and stats.hits + stats.misses == 8


@pytest.mark.parametrize("slots", [2, 4, 8, 16])
def test_reads_little_beyond_what_is_missed(folder, slots, monkeypatch):
    monkeypatch.setattr(ahead, "MIN_PRECISION", 0.0)  # guess at every chance: the bound alone holds it back
    model = load(folder, slots * SLOT)
    generate(model, tokens=60)
    stats = model.expert_stats()
    assert stats.bytes_read <= 1.1 * stats.bytes_missed
    assert stats.bytes_wasted <= cache.WASTE * stats.bytes_read + EXPERT
    assert stats.bytes_prefetched <= stats.bytes_read


def test_reads_ahead_what_the_next_layer_wants(folder, mapped, monkeypatch):
    """A next layer that is sure to want the same experts has some of them read by the time it asks."""
    monkeypatch.setattr(cache, "WASTE", 1.0)
    model = load(folder, 10 * SLOT)
    streams = [layer(model, index).stream for index in (1, 2)]
    wanted = []
    serve = streams[0].cache.serve
    monkeypatch.setattr(
        streams[0].cache,
        "serve",
        lambda number, experts, *rest: wanted.append((number, experts)) or serve(number, experts, *rest),
    )
    monkeypatch.setattr(streams[0]._predictor, "rank", lambda hidden: seen[len(wanted) // 2])
    ids = [PROMPT[:, i : i + 1] for i in range(20)]
    reference = load(folder, "100MB")
    seen = []
    other = layer(reference, 2).stream
    run = other.cache.serve
    monkeypatch.setattr(
        other.cache,
        "serve",
        lambda number, experts, *rest: (number == 1 and seen.append(experts)) or run(number, experts, *rest),
    )
    for one in ids:
        logits(reference, one)
    for one in ids:
        assert same_bits(logits(model, one), logits(mapped, one))
    stats = model.expert_stats()
    assert stats.bytes_prefetched > 0 and stats.bytes_wasted == 0
    assert stats.bytes_read == stats.bytes_missed
    assert streams[0]._predictor.precision(0) == 1


def test_wrong_guesses_are_counted_and_end(folder, mapped, monkeypatch):
    monkeypatch.setattr(ahead, "LEAST_GUESSES", 0)
    monkeypatch.setattr(ahead, "MIN_PRECISION", -1.0)
    model = load(folder, 12 * SLOT)
    predictor = layer(model, 1).stream._predictor
    right = predictor.rank
    monkeypatch.setattr(predictor, "rank", lambda hidden: [e for e in range(16) if e not in right(hidden)][:4])
    for i in range(36):
        ids = PROMPT[:, i : i + 1]
        assert same_bits(logits(model, ids), logits(mapped, ids))
    stats = model.expert_stats()
    assert 0 < stats.bytes_wasted <= cache.WASTE * stats.bytes_read + EXPERT
    assert stats.bytes_read <= 1.1 * stats.bytes_missed


def test_budgets(folder, mapped):
    least = 2 * layer(load(folder, "100MB")).stream.cache.slot_bytes
    model = load(folder, least)
    assert model.expert_stats().budget_bytes == least
    for wrong in (0, least - 1, "1KB"):
        with pytest.raises(ValueError, match=f"the least is {least:,} bytes"):
            model.set_expert_memory(wrong)
    with pytest.raises(ValueError, match="8 potatoes"):
        model.set_expert_memory("8 potatoes")
    assert model.expert_stats().budget_bytes == least  # as before
    model.set_expert_memory("1MB")
    assert model.expert_stats().budget_bytes == 1_000_000
    assert same_bits(logits(model), logits(mapped))
    model.set_expert_memory(None)
    assert model.expert_stats() is None
    assert same_bits(logits(model), logits(mapped))


def test_needs_mapped_experts(tmp_path):
    write_release(tmp_path / "bf16", SHAPES["v2-lite"]())
    model = load(tmp_path / "bf16")
    assert model.expert_stats() is None
    model.set_expert_memory(None)
    with pytest.raises(ValueError, match="no experts mapped"):
        model.set_expert_memory("1GB")


def test_gradients_go_through_the_mapped_files(folder, mapped):
    streamed = load(folder, 2 * SLOT)
    for model in (mapped, streamed):
        model(PROMPT, labels=PROMPT).loss.backward()
    assert streamed.expert_stats().misses == 0
    assert same_bits(streamed.model.norm.weight.grad, mapped.model.norm.weight.grad)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_direct_io_or_not(folder, mapped, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(reader, "fcntl", None)
    model = load(folder, 5 * SLOT)
    assert model.expert_stats().direct_io is None
    assert same_bits(logits(model), logits(mapped))
    if not direct:
        assert model.expert_stats().direct_io is False


def test_a_file_system_that_refuses_direct_reads_late(folder, mapped, monkeypatch):
    model = load(folder, 5 * SLOT)
    if reader.fcntl is None or not hasattr(os, "O_DIRECT"):
        pytest.skip("no direct reads here")
    preadv = os.preadv

    def refuse(descriptor, buffers, offset):
        if reader.fcntl.fcntl(descriptor, reader.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    assert same_bits(logits(model), logits(mapped))
    assert model.expert_stats().direct_io is False


def threads() -> int:
    return sum(thread.name == THREAD_NAME for thread in threading.enumerate())


def test_threads_end_with_the_model(folder):
    gc.collect()
    before = threads()
    model = load(folder, 5 * SLOT)
    logits(model)
    assert threads() > before
    del model
    gc.collect()
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_a_cache_of_its_own(folder):
    model = load(folder, 5 * SLOT)
    expected = logits(model)
    assert answer_of_fork(lambda: b"same" if same_bits(logits(model), expected) else b"not!") == b"same"
    assert same_bits(logits(model), expected)


def test_two_models_have_two_caches(folder, mapped):
    one, other = load(folder, 3 * SLOT), load(folder, 30 * SLOT)
    expected = logits(mapped)
    for _ in range(2):
        assert same_bits(logits(one), expected) and same_bits(logits(other), expected)
    assert one.expert_stats().hits < other.expert_stats().hits
    assert one.expert_stats().budget_bytes < other.expert_stats().budget_bytes


def test_two_threads_on_one_model(folder, mapped):
    model = load(folder, 4 * SLOT)
    prompts = [PROMPT[:, i : i + 6] for i in range(0, 36, 6)]
    expected, found = [logits(mapped, ids) for ids in prompts], [None] * len(prompts)

    def work(start):
        torch.set_num_threads(1)
        for i in range(start, len(prompts), 2):
            found[i] = logits(model, prompts[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_mapped(folder, mapped, how):
    model = load(folder, 5 * SLOT)
    logits(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.expert_stats() is None and model.expert_stats() is not None
    assert same_bits(logits(other), logits(mapped))
    other.set_expert_memory(3 * SLOT)
    assert same_bits(logits(other), logits(model))


def test_saves_the_same_bytes(folder, tmp_path):
    from safetensors.torch import load_file

    model = load(folder, 5 * SLOT, "auto")
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    saved, released = {}, {}
    for path, tensors in ((tmp_path / "saved", saved), (folder, released)):
        for file in path.glob("*.safetensors"):
            tensors |= load_file(file)
    assert saved.keys() == released.keys()
    assert all(same_bits(saved[name], released[name]) for name in saved)


def test_other_weights_come_into_memory(folder, mapped, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_moe.streaming.resident.SMALL", 1000)
    model = load(folder, 5 * SLOT, "auto")
    files = layer(model).files
    linear = model.model.layers[1].self_attn.o_proj.weight
    before = linear.clone()
    assert files.find(linear) and files.find(model.model.embed_tokens.weight)
    logits(model)
    inside = {name for name, parameter in model.named_parameters() if files.find(parameter)}
    assert all("embed_tokens" in name or name.startswith("model.layers.3.") for name in inside) and inside
    assert same_bits(linear.data, before)
    assert same_bits(logits(model), logits(load(folder, dtype="auto")))


@pytest.fixture
def with_memory(monkeypatch):
    def pretend(nbytes):
        machine = Machine(nbytes, nbytes, 1, None)
        monkeypatch.setattr(streaming_model, "probe_machine", lambda measure: machine)
        monkeypatch.setattr(streaming_model, "WORKSPACE_BYTES", 0)

    return pretend


def test_turned_on_where_memory_is_short(folder, mapped, with_memory, caplog):
    logging.enable_propagation()
    rest = streaming_model._resident(mapped, layer(mapped).files).nbytes
    with_memory(rest + 4 * SLOT)
    model = load(folder)
    assert "GB of them kept" in caplog.text
    assert 0 < model.expert_stats().budget_bytes <= 4 * SLOT
    assert same_bits(logits(model), logits(mapped))
    with_memory(rest)
    assert load(folder).expert_stats() is None
    assert "too little" in caplog.text
    with_memory(10 * rest + 1_000_000)
    assert load(folder).expert_stats() is None
