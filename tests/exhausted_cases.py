"""A device without enough memory, at every allocation: run by test_gpu_memory.py, in a process of its own.

The device is written in Python and counts what is alive on it, errors and their tracebacks included.
"""

import re

import fake_device
import pytest
import torch
from fake_device import Memory
from releases import SHAPES, write_release
from test_mapped_moves import write_fp8, write_int4, write_nf4
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import moving
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.hybrid import placement
from modeling_deepseek_moe.hybrid.copies import Copies
from modeling_deepseek_moe.hybrid.slots import expert_bytes
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.quantized.mapped import MappedExperts

DEVICE = f"{fake_device.NAME}:0"
LIBRARIES = fake_device.register()
APART = {"": DEVICE, "model.layers.*.mlp.experts": "cpu"}
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
FREE = rf"[\d,]+ bytes are free on {DEVICE}"


def write_bf16(folder):
    write_release(folder, SHAPES["v3"]())


@pytest.fixture(scope="module", params=[write_fp8, write_int4, write_bf16], ids=["fp8", "int4", "bf16"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "release"
    request.param(path)
    return path


@pytest.fixture(autouse=True)
def plain():
    """One kernel for all: what each operation is defined by."""
    with use_backend("reference"), torch.no_grad():
        yield
    Memory.left = None


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **how)


def logits(model):
    return model(IDS.to(model.device)).logits.cpu()


def allocations(call) -> int:
    Memory.allocations = 0
    call()
    return Memory.allocations


def turns(call) -> list[int]:
    """How many allocations ``call`` is left with, in turns, to fail: none, all but one, and some in between."""
    before, count = Memory.used(), allocations(call)
    assert Memory.used() == before and count >= 2
    return sorted({0, count // 3, 2 * count // 3, count - 1})


def fails(call, left: int, match: str) -> str:
    """The error of ``call`` with ``left`` allocations: it holds nothing on the device, as long as it lives."""
    before, Memory.left = Memory.used(), left
    with pytest.raises(torch.OutOfMemoryError, match=match) as error:
        call()
    Memory.left = None
    assert "fake:0 has no" in str(error.value)
    assert error.value.__context__ is None and error.value.__cause__ is None
    assert Memory.used() == before, f"after {left} allocations"
    return str(error.value)


def test_moved(folder):
    kept, model = load(folder), load(folder)
    assert not any(p.device.type == "fake" for p in model.parameters())
    model.to(DEVICE)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"fake"}
    assert not any(isinstance(module, MappedExperts) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(kept), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.to("cpu")), logits(kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device_map", [DEVICE, "auto"])
def test_loaded(folder, device_map, monkeypatch):
    monkeypatch.setattr(placement, "get_max_memory", dict)  # accelerate's knows no device of this kind
    room = {"max_memory": {0: 4 << 30, "cpu": 4 << 30}} if device_map == "auto" else {}
    model = load(folder, device_map=device_map, **room)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"fake"}
    torch.testing.assert_close(logits(model), logits(load(folder)), rtol=1e-4, atol=1e-4)


def test_memory_ends_while_loading_with_a_map_of_sizes(folder, monkeypatch):
    """Or with none, where an earlier device is the default: the report names every accelerator."""
    monkeypatch.setattr(placement, "get_max_memory", dict)
    auto = {"device_map": "auto", "max_memory": {0: 4 << 30, "cpu": 4 << 30}}
    fails(lambda: load(folder, **auto), 3, rf"exhausted while loading, nothing of the model is kept: .*; {FREE}")


@pytest.mark.parametrize("device_map", [DEVICE, APART], ids=["whole", "apart"])
def test_memory_ends_while_loading(folder, device_map):
    match = rf"exhausted while loading, nothing of the model is kept: .*{FREE}"
    counts = turns(lambda: load(folder, device_map=device_map))
    said = [fails(lambda: load(folder, device_map=device_map), left, match) for left in counts]
    # the last allocations are for what is made, not read: rotary frequencies
    assert all(
        re.search(r"[\w.]+ takes [\d,]+ bytes, \d+ of \d+ tensors, [\d,]+ bytes, were", text) for text in said[:-1]
    )


def test_memory_ends_while_moving(folder):
    model = load(folder)
    wanted, kinds = logits(model), [type(module) for module in model.modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for left in turns(lambda: load(folder).to(DEVICE)):
        fails(lambda: model.to(DEVICE), left, rf"stays where it was: [\w.]+ takes [\d,]+ bytes, .*{FREE}")
        assert [type(module) for module in model.modules()] == kinds
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert torch.equal(logits(model), wanted)
    model.to(DEVICE)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"fake"}
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_own", [True, False])
def test_tensors_are_given_up_one_by_one_where_the_host_has_the_memory(folder, monkeypatch, is_own):
    monkeypatch.setattr(moving, "has_own_memory", lambda _: is_own)
    model, gone = load(folder), []
    first, norm = model.model.embed_tokens, model.model.layers[2].input_layernorm
    held, apply = StorageWeakRef(first.weight.untyped_storage()), norm._apply

    def watching(fn, recurse=True):
        gone.append(first.weight.device.type == "fake" and held.expired())
        return apply(fn, recurse)

    monkeypatch.setattr(norm, "_apply", watching)
    model.to(DEVICE)
    assert gone == [not is_own] and {t.device.type for t in (*model.parameters(), *model.buffers())} == {"fake"}


def test_memory_ends_in_the_stacks_of_nf4(tmp_path):
    """Experts alone: bitsandbytes' own layers know no device written in Python."""
    write_nf4(tmp_path / "release")
    experts, kept = (load(tmp_path / "release").model.layers[1].mlp.experts for _ in range(2))
    given = torch.randn(3, 128), torch.tensor([[0, 3], [1, 2], [5, 9]]), torch.rand(3, 2)
    wanted, used = experts(*given), Memory.used()
    for left in turns(lambda: load(tmp_path / "release").model.layers[1].mlp.experts.to(DEVICE)):
        Memory.left = left
        with pytest.raises(torch.OutOfMemoryError):
            experts.to(DEVICE)
        Memory.left = None
        assert Memory.used() == used and isinstance(experts, MappedExperts)
    assert torch.equal(experts(*given), wanted)
    experts.to(DEVICE)
    assert not isinstance(experts, MappedExperts) and {p.device.type for p in experts.parameters()} == {"fake"}
    for index in range(kept.num_experts):
        for found, matrix in zip(experts.matrices(index).values(), kept.matrices(index).values(), strict=True):
            assert torch.equal(found.codes.cpu(), matrix.codes)


@pytest.mark.parametrize("compute", ["cpu", "gpu"])
def test_memory_ends_while_experts_are_given_theirs(folder, compute):
    model = load(folder, device_map=APART)
    wanted, used = logits(model), Memory.used()
    size = expert_bytes(model.model.layers[1].mlp.experts)
    give = lambda: model.set_expert_memory(gpu=8 * size, compute=compute)  # noqa: E731
    match = rf"8 experts of {size:,} bytes: found too little free on {DEVICE} .*goes on without, {FREE}: wanted a smaller gpu="
    for left in turns(lambda: (give(), model.set_expert_memory(gpu=None))):
        fails(give, left, match)
        assert Memory.used() == used and model.gpu_expert_stats() is None
    assert torch.equal(logits(model), wanted)
    give()
    assert Memory.used() >= used + 8 * size
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def exhausts(monkeypatch, owner, name: str, number: int) -> None:
    """The ``number``-th call of a function finds no memory on the device."""
    function, calls = getattr(owner, name), []

    def call(*arguments, **named):
        calls.append(name)
        if len(calls) == number:
            raise torch.OutOfMemoryError("fake:0 has no 7 bytes")
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, call)


def test_memory_ends_in_a_copy_to_a_resident_expert(folder):
    model = load(folder, device_map=APART)
    wanted, used = logits(model), Memory.used()
    size = expert_bytes(model.model.layers[1].mlp.experts)
    with pytest.MonkeyPatch.context() as patch:
        exhausts(patch, Copies, "put", 8)
        with pytest.raises(torch.OutOfMemoryError, match=rf"has no 7 bytes.*{FREE}") as error:
            model.set_expert_memory(gpu=8 * size, compute="cpu")
        assert error.value.__context__ is None and Memory.used() == used and model.gpu_expert_stats() is None
        assert torch.equal(logits(model), wanted)
    model.set_expert_memory(gpu=8 * size, compute="cpu")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_memory_ends_in_a_copy_of_the_offload(folder):
    model = load(folder, device_map=APART)
    wanted, size = logits(model), expert_bytes(model.model.layers[1].mlp.experts)
    model.set_expert_memory(gpu=5 * size, compute="gpu")
    slots, used = model.model.layers[1].mlp.places.passing, Memory.used()
    match = rf"experts of layer 1, 18 tokens \(fake:0 has no 7 bytes\); room for experts takes {5 * size:,} bytes, now {FREE}: wanted fewer"
    with pytest.MonkeyPatch.context() as patch:
        exhausts(patch, Copies, "put", 3)
        with pytest.raises(torch.OutOfMemoryError, match=match) as error:
            logits(model)
        assert error.value.__context__ is None and error.value.__cause__ is None
        del error
    assert Memory.used() == used
    held = slots.held()
    assert len(held) == 2 and len(held) + len(slots._free) == 5
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", ["cpu", "gpu"])
def test_memory_ends_while_a_layer_of_the_offload_computes(folder, compute):
    """At allocations of the layer itself: what it made is gone, as long as the error lives."""
    model = load(folder, device_map=APART)
    model.set_expert_memory(gpu=5 * expert_bytes(model.model.layers[1].mlp.experts), compute=compute)
    layer = model.model.layers[1].mlp
    hidden = torch.randn(9, model.config.hidden_size).to(DEVICE)
    indices = torch.arange(18).view(9, 2).remainder(layer.experts.num_experts).to(DEVICE)
    weights = torch.ones(9, 2).to(DEVICE)
    pending = layer.places.begin(hidden, indices, weights)
    finish = lambda: layer.places.finish(1, layer.experts, pending)  # noqa: E731
    wanted = finish()
    count = allocations(finish)
    assert count
    for left in sorted({0, count // 2, count - 1}):
        said = fails(finish, left, rf"experts of layer 1, 9 tokens .*{FREE}: wanted fewer tokens at once")
        assert "room for experts takes" in said
    torch.testing.assert_close(finish().cpu(), wanted.cpu(), rtol=1e-5, atol=1e-5)


def test_a_file_that_changed_half_way_leaves_a_model_where_it_was(folder, monkeypatch):
    """Not memory, but the same promise: no half of a model on each side."""
    model = load(folder)
    wanted, used, moved = logits(model), Memory.used(), []
    norm = model.model.layers[2].input_layernorm

    def failing(fn, recurse=True):
        moved.append(Memory.used() > used)
        raise CheckpointError("model.safetensors: found it changed")

    monkeypatch.setattr(norm, "_apply", failing)
    with pytest.raises(CheckpointError, match="found it changed"):
        model.to(DEVICE)
    monkeypatch.undo()
    assert moved == [True] and {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), wanted)
    model.to(DEVICE)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
