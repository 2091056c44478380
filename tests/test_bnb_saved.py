"""Models with routed experts by bitsandbytes, saved and loaded: bits, files, and files that are broken."""

import copy
import json
import os
import re
from functools import partial

import pytest
import torch
from releases import same_bits
from safetensors.torch import load_file, save_file

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.conversion.verify import verify
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts
from modeling_deepseek_moe.quantized.bitsandbytes_mapped import MappedBitsAndBytesExperts

pytest.importorskip("bitsandbytes")
from bnb_models import KINDS, apart, experts_of, load, logits, one_by_one, wish, write_folders

pytestmark = pytest.mark.tools

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
LAYER = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "int8"])
def test_saved_and_loaded(folders, tmp_path, kind, used):
    model = load(folders["ragged", True], wish(kind, torch.bfloat16), dtype=torch.bfloat16)
    if used:
        logits(model)  # which repacks bitsandbytes' linear layers, and nothing of experts
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "bitsandbytes" and fields["load_in_8bit"] is (kind == "int8")
    again = load(tmp_path)
    wanted, found = model.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys() and any(".mlp.experts." in name for name in found)
    assert all(same_bits(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(again), logits(model))
    assert again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_on_a_cpu_experts_stay_in_the_files(folders, tmp_path, kind):
    """Where a row is whole blocks: no copy of the codes, in memory or in the state dict; nor of those of nested scales."""
    settings = {"llm_int8_skip_modules": ["lm_head", "shared_experts.up_proj"]}
    model = load(folders["blocks", True], wish(kind, **settings), dtype=torch.float32)
    model.save_pretrained(tmp_path / "first")
    mapped = load(tmp_path / "first")
    experts = experts_of(mapped)[0]
    assert isinstance(experts, MappedBitsAndBytesExperts) and not list(experts.parameters())
    gate = experts.matrices(0)["gate_proj"]
    assert experts.files.find(gate.codes) is not None
    assert not experts.nested or experts.files.find(gate.scales.codes) is not None
    assert mapped.num_parameters() == model.num_parameters()
    assert torch.equal(logits(mapped), logits(model))
    mapped.set_expert_memory("200KB")
    assert torch.equal(logits(mapped), logits(model))
    routed = torch.randn(3, 128), torch.tensor([[1], [5], [15]]), torch.ones(3, 1)
    with dsm.use_backend("reference"):
        streamed = experts(*routed)
        mapped.set_expert_memory(None)
        assert torch.equal(experts(*routed), streamed)
    assert torch.equal(copy.deepcopy(experts)(*routed), experts(*routed))
    mapped.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)
    wanted = logits(mapped)
    stacks = experts_of(mapped.dequantize())[0]
    assert torch.equal(stacks.down_proj[5], experts.dequantized(experts.matrices(5)["down_proj"], torch.float32))
    assert apart(logits(mapped), wanted) < 0.05
    with pytest.raises(ValueError, match=r"call model\.dequantize"):
        model.save_pretrained(tmp_path / "third", variant="other")
    with pytest.raises(ValueError, match="quantize='fp8': found weights that bitsandbytes quantised"):
        model.save_pretrained(tmp_path / "third", quantize="fp8")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("shape", ["blocks", "ragged"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_a_file_that_was_cut_short_is_seen_before_it_is_read(folders, tmp_path, kind, shape, used):
    """Linear layers are views of the files too: reading past the end would end the process."""
    load(folders[shape, True], wish(kind)).save_pretrained(tmp_path / "saved")
    model, (file,) = load(tmp_path / "saved"), (tmp_path / "saved").glob("*.safetensors")
    if used:
        logits(model)
    os.truncate(file, file.stat().st_size // 2)
    ids = torch.arange(3, 9)[None]
    for call in (
        model,
        partial(model.generate, max_new_tokens=2),
        lambda ids: model.save_pretrained(tmp_path / "again"),
    ):
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}: found .*changed after the checkpoint"):
            call(ids)


def test_mapped_experts_pass_gradients_on(folders, tmp_path):
    model = load(folders["blocks", False], wish("nf4"), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    found = []
    for module in (experts_of(model)[0], experts_of(load(tmp_path))[0]):
        hidden = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        module(hidden, torch.arange(28).view(7, 4) % 16, torch.full((7, 4), 0.25)).square().sum().backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_a_part_of_nested_experts_and_stacks_of_them(folders, tmp_path):
    """What a rank keeps has the values of its experts, and so have stacks."""
    load(folders["blocks", False], wish("nf4-double"), dtype=torch.float32).save_pretrained(tmp_path)
    experts = experts_of(load(tmp_path))[0]
    wanted = [experts.dequantized(matrix, torch.float32) for matrix in experts.matrices(9).values()]
    hidden, chosen = torch.randn(3, 128), torch.full((3, 1), 9)
    output = experts(hidden, chosen, torch.ones(3, 1))
    experts.keep(8, 4)
    assert torch.equal(experts(hidden, chosen - 8, torch.ones(3, 1)), output)
    experts.restack("cpu")
    assert type(experts) is BitsAndBytesExperts and experts.nested
    found = [experts.dequantized(matrix, torch.float32) for matrix in experts.matrices(1).values()]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert torch.equal(experts(hidden, chosen - 8, torch.ones(3, 1)), output)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_disk_as_layers_of_bitsandbytes_save_themselves(folders, tmp_path, kind):
    config = wish(kind)
    load(folders["ragged", False], config).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.mlp.experts"
    layers = experts_of(one_by_one(folders["ragged", False], config))[0].experts.state_dict()
    assert {name.removeprefix(prefix + ".") for name in saved if name.startswith(prefix)} == layers.keys()
    assert all(same_bits(saved[f"{prefix}.{name}"], tensor) for name, tensor in layers.items())


def edited(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BREAKS = {
    "no scales": (lambda t: t.pop(f"{EXPERT}.absmax"), r"experts.2.up_proj.weight.absmax: found no such tensor"),
    "other shape": (
        lambda t: t.update({EXPERT: t[EXPERT][:-8].clone()}),
        r"up_proj.weight: found \[\d+, 1\].*wanted \d+ values",
    ),
    "other dtype": (
        lambda t: t.update({f"{EXPERT}.absmax": t[f"{EXPERT}.absmax"].float()}),
        r"absmax: found .*float32, wanted",
    ),
    "other table": (
        lambda t: t.update({f"{EXPERT}.nested_quant_map": torch.zeros(256)}),
        r"nested_quant_map: found another table",
    ),
    "other values": (
        lambda t: t[f"{EXPERT}.quant_map"].mul_(2),
        r"up_proj.weight.quant_map: found .*wanted the 16 values of nf4",
    ),
    "no values": (
        lambda t: t.pop(f"{EXPERT}.quant_map"),
        r"up_proj.weight.quant_map: found no such tensor",
    ),
    "a layer's other values": (
        lambda t: t[f"{LAYER}.quant_map"].neg_(),
        r"o_proj.weight.quant_map: found .*wanted the 16 values of nf4",
    ),
    "no state": (
        lambda t: t.update({f"{EXPERT}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)}),
        r"bitsandbytes__nf4: found no state",
    ),
    "a layer without scales": (lambda t: t.pop(f"{LAYER}.absmax"), r"o_proj.weight.absmax: found no such tensor"),
    "a layer of other scales": (
        lambda t: t.update({f"{LAYER}.absmax": t[f"{LAYER}.absmax"][:-1].clone()}),
        r"o_proj.weight.absmax: found \[\d+\].*wanted \d+ values",
    ),
    "a layer of another shape": (
        lambda t: t.update({LAYER: t[LAYER][:-8].clone()}),
        r"o_proj.weight: found \[\d+, 1\].*wanted \d+ values",
    ),
    "a layer's NaN": (
        lambda t: t[f"{LAYER}.nested_absmax"].fill_(float("nan")),
        r"o_proj.weight.nested_absmax: found a NaN",
    ),
    "a layer without a state": (
        lambda t: t.update({f"{LAYER}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)}),
        r"o_proj.*bitsandbytes__nf4: found no state",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_files_are_refused_by_tensor(folders, tmp_path, name):
    load(folders["ragged", False], wish("nf4-double")).save_pretrained(tmp_path)
    change, said = BREAKS[name]
    edited(tmp_path, change)
    with pytest.raises(dsm.CheckpointError, match=said):
        load(tmp_path)


def test_the_rest_of_a_model_has_the_dtype_that_is_asked_for(folders, tmp_path):
    load(folders["blocks", False], wish("nf4")).save_pretrained(tmp_path)
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.arange(10)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_plan_and_inspect_tell_what_lies_there(folders, tmp_path, kind):
    load(folders["blocks", False], wish(kind)).save_pretrained(tmp_path)
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    breakdown = parameter_breakdown(dsm.read_config(tmp_path))
    assert breakdown.weight_format.name == kind.partition("-")[0]
    # the tables of nested scales weigh much next to matrices as small as these
    tables = 1024 * len(load_file(tmp_path / "model.safetensors")) / 7 if kind == "nf4-double" else 0
    assert breakdown.stored_bytes(breakdown.weight_format) == pytest.approx(held - tables, rel=0.04)
    found = dsm.inspect_checkpoint(tmp_path)
    assert found.is_loadable and not found.findings and found.total.nbytes == held
    assert verify(tmp_path).is_sound
    scales = f"{LAYER.removesuffix('weight')}SCB" if kind == "int8" else f"{LAYER}.absmax"
    edited(tmp_path, lambda tensors: tensors.update({scales: tensors[scales][:-1].clone()}))
    [finding] = dsm.inspect_checkpoint(tmp_path).findings
    assert finding.fatal and finding.kind == "scale" and scales in finding.message
    edited(tmp_path, lambda tensors: tensors.pop(scales))
    [finding] = dsm.inspect_checkpoint(tmp_path).findings
    assert finding.fatal and finding.kind == "scale" and scales in finding.message
    edited(tmp_path, lambda tensors: tensors.pop(EXPERT))
    assert "missing" in [finding.kind for finding in dsm.inspect_checkpoint(tmp_path).findings if finding.fatal]
    assert not dsm.inspect_checkpoint(tmp_path).is_loadable
