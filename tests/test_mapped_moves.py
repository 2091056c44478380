"""Models loaded on the CPU, with experts mapped from their files, that are moved to another device afterwards."""

import copy

import pytest
import torch
from releases import SHAPES, same_bits, write_release
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts

IDS = torch.arange(3, 12)[None]


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers[1:]]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def write_fp8(folder):
    write_release(folder, SHAPES["v3"](), fp8=True)


def write_int4(folder):
    write_release(folder.parent / "bf16", SHAPES["v3"]())
    load(folder.parent / "bf16").to(torch.bfloat16).save_pretrained(folder, quantize="int4")


def write_nf4(folder):
    bnb_models = pytest.importorskip("bnb_models")
    source = bnb_models.write_folders(Folders(folder.parent))["blocks", False]
    bnb_models.load(source, bnb_models.wish(), dtype=torch.float32).save_pretrained(folder)


class Folders:
    """As pytest's ``tmp_path_factory``."""

    def __init__(self, base):
        self.base, self.count = base, 0

    def mktemp(self, name):
        self.count += 1
        return self.base / f"{name}{self.count}"


KINDS = {
    "fp8": (write_fp8, StackedQuantizedExperts),
    "int4": (write_int4, StackedQuantizedExperts),
    "nf4": (write_nf4, BitsAndBytesExperts),
}


@pytest.fixture(scope="module", params=KINDS)
def release(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "release"
    write, stacked = KINDS[request.param]
    write(folder)
    return folder, stacked


def test_moved_to_a_device_they_are_stacked_there(release):
    folder, stacked = release
    model = load(folder)
    assert all(isinstance(experts, MappedExperts) for experts in experts_of(model))
    parts = experts_of(model)
    called = []
    parts[0].register_forward_pre_hook(lambda *_: called.append(1))
    if stacked is BitsAndBytesExperts:  # bitsandbytes' own layers do not go there
        for experts in parts:
            experts.to("meta")
    else:
        model.to("meta")
        tensors = (*model.named_parameters(), *model.named_buffers())
        assert [name for name, tensor in tensors if tensor.device.type != "meta"] == []
    assert {type(experts) for experts in experts_of(model)} == {stacked}
    assert all(a is b for a, b in zip(parts, experts_of(model), strict=True))
    assert {p.device.type for experts in parts for p in experts.parameters()} == {"meta"}
    assert len(list(parts[0].parameters())) >= 4 and not any(p.requires_grad for p in parts[0].parameters())
    assert len(parts[0]._forward_pre_hooks) == 1 and not parts[0].training


def test_stacked_they_have_the_same_bytes_and_results(release, tmp_path):
    folder, _ = release
    model, kept = load(folder), load(folder)
    for experts, mapped in zip(experts_of(model), experts_of(kept), strict=True):
        experts.restack("cpu")
        for index in range(mapped.num_experts):
            for name, matrix in mapped.matrices(index).items():
                found = experts.matrices(index)[name]
                assert same_bits(found.codes, matrix.codes)
                assert torch.equal(found.scales.float(), matrix.scales.float())
    assert torch.equal(logits(model), logits(kept))
    model.save_pretrained(tmp_path / "a"), kept.save_pretrained(tmp_path / "b")
    for file in (tmp_path / "b").glob("*.safetensors"):
        found, wanted = load_file(tmp_path / "a" / file.name), load_file(file)
        assert found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.cpu()], ids=["bf16", "fp32", "cpu"]
)
def test_casts_and_moves_to_the_cpu_leave_them_mapped(release, move):
    model = load(release[0])
    for layer in model.model.layers[1:]:
        move(layer.mlp)
    assert all(isinstance(experts, MappedExperts) for experts in experts_of(model))


def test_a_step_that_was_planned_before_is_planned_again(release):
    """The engine's table of a decoder points to mapped codes."""
    model = load(release[0])
    wanted = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4)
    for experts in experts_of(model):
        experts.restack("cpu")
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(found, wanted)


def test_files_that_changed_are_told_and_nothing_is_moved(tmp_path):
    write_fp8(tmp_path / "release")
    model = load(tmp_path / "release")
    other = copy.deepcopy(model)
    file = next((tmp_path / "release").glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\0")
    for experts in (experts_of(model)[0], experts_of(other)[0]):
        with pytest.raises(CheckpointError, match=r"changed|rewritten"):
            experts.to("meta")
        assert type(experts) is MappedExperts
