"""Routed experts by bitsandbytes: what they compute next to a `Linear4bit` for each projection, and from what they are made."""

import copy
import pickle
import weakref

import pytest
import torch
from releases import COMMON, V3, same_bits, write_release
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.conversion._bitsandbytes import open_folder
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts, BitsAndBytesMatrices

pytest.importorskip("bitsandbytes")
from bnb_models import KINDS, SIZES, WIDTHS, apart, experts_of, load, logits, one_by_one, wish, write_folders

pytestmark = pytest.mark.tools

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_layer_for_each_projection(folders, kind, width, dtype):
    for compute in (torch.float32, torch.bfloat16):
        config = wish(kind, compute)
        wanted = logits(one_by_one(folders[width, False], config, dtype=dtype))
        model = load(folders[width, False], config, dtype=dtype)
        assert all(type(module) is BitsAndBytesExperts for module in experts_of(model)) and experts_of(model)
        exact = dtype == compute == torch.float32
        assert apart(logits(model), wanted) < (1e-5 if exact else 2e-2)


def test_the_compute_dtype_is_what_hidden_states_are_cast_to(folders):
    found = [
        load(folders["blocks", False], wish("nf4", dtype), dtype=torch.float32)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    hidden = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    indices, weights = torch.zeros((5, 1), dtype=torch.int64), torch.ones((5, 1))
    exact, rounded = (experts_of(model)[0](hidden, indices, weights) for model in found)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < apart(rounded, exact) < 2e-2


@pytest.mark.parametrize("kind", [*KINDS, "int8"])
def test_an_fp8_release_gives_what_its_bf16_copy_gives(folders, tmp_path, kind):
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(folders["ragged", True], **settings).save_pretrained(tmp_path)
    wanted, found = (load(path, wish(kind)).state_dict() for path in (tmp_path, folders["ragged", True]))
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


def test_an_fp8_release_by_its_class_with_changes_of_its_config(folders):
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for given in (wish(), fields):
        model = dsm.DeepseekV3ForCausalLM.from_pretrained(
            folders["blocks", True], quantization_config=given, dtype=torch.float32, routed_scaling_factor=1.5
        )
        assert model.config.routed_scaling_factor == 1.5 and len(experts_of(model)) == 1
        assert type(model.config.quantization_config) is BitsAndBytesConfig
        assert logits(model).isfinite().all()
    config = dsm.DeepseekV3Config.from_pretrained(folders["blocks", True])
    AutoModelForCausalLM.from_pretrained(folders["blocks", True], config=config, quantization_config=wish())
    assert config.quantization_config["release_quant_method"] == "fp8"  # the caller's own is left alone


class LiveFloats(TorchDispatchMode):
    """The most bytes of floating-point tensors that were alive at once, of those made meanwhile."""

    def __init__(self):
        super().__init__()
        self.live, self.counts, self.peak = {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type == "cpu":
                self.add(tensor)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        self.counts[pointer] = self.counts.get(pointer, 0) + 1
        self.live[pointer] = storage.nbytes()
        weakref.finalize(tensor, self.drop, pointer)
        self.peak = max(self.peak, sum(self.live.values()))

    def drop(self, pointer):
        self.counts[pointer] -= 1
        if not self.counts[pointer]:
            self.live.pop(pointer)


@pytest.mark.parametrize("fp8", [False, True])
def test_never_more_than_one_expert_in_floating_point(tmp_path, fp8):
    """Were a projection of all experts decoded at once, it would take 64 times a matrix, and a layer three times as much."""
    sizes = {"moe_intermediate_size": 256, "hidden_size": 256, "n_routed_experts": 64, "num_hidden_layers": 2}
    write_release(tmp_path, dsm.DeepseekV3Config(**(COMMON | V3 | sizes)), fp8=fp8)
    with LiveFloats() as floats:
        model = load(tmp_path, wish("nf4-double"), dtype=torch.bfloat16)
    experts = experts_of(model)[0]
    held = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    one_expert = 3 * 256 * 256 * 4  # in fp32, as bitsandbytes looks at it
    assert floats.peak < held + 2 * one_expert < held + 64 * 256 * 256 * 2
    assert experts.gate_codes.dtype == torch.uint8


@pytest.mark.parametrize("kind", [*KINDS, "int8"])
def test_gradients_flow_to_the_input_and_never_to_codes(folders, kind):
    model = load(folders["ragged", False], wish(kind), dtype=torch.float32)
    experts = experts_of(model)[0]
    assert not any(parameter.requires_grad for parameter in experts.parameters())
    decoded = experts_of(load(folders["ragged", False], wish(kind), dtype=torch.float32).dequantize())[0]
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(16, (7, 4), generator=generator)
    inputs = torch.randn(7, 128, generator=generator), torch.rand(7, 4, generator=generator)
    found = []
    for module in (experts, decoded):
        hidden, weights = (tensor.clone().requires_grad_() for tensor in inputs)
        out = module(hidden, indices, weights)
        out.square().sum().backward()
        found.append((out.detach(), hidden.grad, weights.grad))
    assert all(apart(ours, exact) < 1e-3 for ours, exact in zip(*found, strict=True))
    assert all(parameter.grad is None for parameter in experts.parameters())


def chosen_experts():
    hidden = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    return hidden, torch.arange(28).view(7, 4) % 16, torch.full((7, 4), 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_runs_them_with_the_reference_s_result(folders, kind):
    model = load(folders["blocks", False], wish(kind), dtype=torch.float32)
    experts = experts_of(model)[0]
    with torch.no_grad():
        found = experts(*chosen_experts())
        with dsm.use_backend("reference"):
            wanted = experts(*chosen_experts())
    assert 0 < apart(found, wanted) < 1e-5 or model.engine_report().unavailable


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [*KINDS, "int8"])
def test_copies_and_pickles_have_memory_of_their_own(folders, kind, width):
    experts = experts_of(load(folders[width, False], wish(kind), dtype=torch.float32))[0]
    with torch.no_grad():
        wanted = experts(*chosen_experts())
        copied, unpickled = copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))
        for parameter in experts.parameters():
            parameter.zero_()
        assert torch.equal(copied(*chosen_experts()), wanted)
        assert torch.equal(unpickled(*chosen_experts()), wanted)


@pytest.mark.parametrize("kind, most", [("nf4", 0.5626), ("nf4-double", 0.52), ("int8", 1.04)])
def test_the_footprint_counts_codes_and_scales(folders, kind, most):
    model = load(folders["blocks", False], wish(kind))
    held = sum(tensor.nbytes for module in experts_of(model) for tensor in module.state_dict().values())
    values = sum(
        parameter.numel() for module in experts_of(load(folders["blocks", False])) for parameter in module.parameters()
    )
    assert held / values < most
    plain = load(folders["blocks", False], wish(kind, llm_int8_skip_modules=["lm_head", "experts"]))
    assert plain.get_memory_footprint() - model.get_memory_footprint() == 2 * values - held
    assert model.num_parameters() == load(folders["blocks", False]).num_parameters()
    scales = sum(
        layer.weight.quant_state.absmax.nbytes for layer in model.modules() if type(layer).__name__ == "Linear4bit"
    )
    assert model.get_memory_footprint() >= sum(tensor.nbytes for tensor in model.parameters()) + scales


def test_a_skip_list_that_names_experts_leaves_them_alone(tmp_path, caplog):
    write_release(tmp_path, dsm.DeepseekV3Config(**(COMMON | V3 | SIZES)))
    for names, wanted in (
        (["experts"], [False, False]),
        (["mlp.experts"], [False, False]),
        (["model.layers.1"], [False, True]),
        (["model.layers.2.mlp.experts"], [True, False]),
        (["gate_proj", "up_proj", "down_proj"], [False, False]),
        (["o_proj", "shared_experts.down_proj"], [True, True]),
        (None, [True, True]),
    ):
        model = load(tmp_path, wish(llm_int8_skip_modules=names))
        assert [type(module) is BitsAndBytesExperts for module in experts_of(model)] == wanted, names
        assert logits(model).isfinite().all()
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert [isinstance(module, BitsAndBytesMatrices) for module in experts_of(again)] == wanted, names
        assert torch.equal(logits(again), logits(model))


def test_part_of_an_expert_in_a_skip_list_is_said(folders, caplog):
    model = load(folders["blocks", False], wish(llm_int8_skip_modules=["lm_head", "gate_proj"]))
    assert type(experts_of(model)[0]) is DeepseekExperts
    assert sum("model.layers.1.mlp.experts (for" in record.getMessage() for record in caplog.records) == 1


def test_the_storage_that_experts_do_not_have_is_said(folders, tmp_path, caplog):
    model = load(folders["blocks", False], wish(bnb_4bit_quant_storage="bfloat16"))
    assert "bnb_4bit_quant_storage=bfloat16 is for linear layers" in caplog.text
    assert model.model.layers[1].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert experts_of(model)[0].gate_codes.dtype == torch.uint8
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    for read in (dsm.inspect_checkpoint, lambda folder: open_folder(folder).weight_formats):
        with pytest.raises(
            (ValueError, dsm.CheckpointError), match="bnb_4bit_quant_storage='bfloat16' is not supported in files"
        ):
            read(tmp_path)
    # a field of 4-bit codes, of which there are none
    load(folders["blocks", False], wish("int8", bnb_4bit_quant_storage="bfloat16")).save_pretrained(tmp_path / "int8")
    assert not dsm.inspect_checkpoint(tmp_path / "int8").findings and open_folder(tmp_path / "int8").weight_formats


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_dequantised(folders, tmp_path, kind):
    model = load(folders["blocks", True], wish(kind), dtype=torch.bfloat16)
    coded = experts_of(model)[0]
    wanted = {name: coded.dequantized(matrix, torch.bfloat16) for name, matrix in coded.matrices(3).items()}
    model = model.dequantize()
    stacks = experts_of(model)[0]
    assert type(stacks) is DeepseekExperts and stacks.down_proj.dtype == torch.bfloat16
    assert torch.equal(stacks.gate_up_proj[3], torch.cat((wanted["gate_proj"], wanted["up_proj"])))
    assert torch.equal(stacks.down_proj[3], wanted["down_proj"])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.num_parameters() == model.num_parameters()


def test_the_dequantised_model_computes_what_the_codes_stand_for(folders):
    others = ["lm_head", "model.layers.0", ".*self_attn", ".*shared_experts"]
    for kind in ("nf4", "nf4-double", "int8"):
        model = load(folders["ragged", False], wish(kind, llm_int8_skip_modules=others), dtype=torch.float32)
        wanted = logits(model)
        assert apart(logits(model.dequantize()), wanted) < 1e-5


def test_weights_that_are_no_numbers_are_refused(folders, tmp_path):
    tensors = load_file(folders["blocks", False] / "model.safetensors")
    tensors[EXPERT][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["blocks", False] / "config.json").read_text())
    for kind in ("nf4", "nf4-double", "int8"):
        with pytest.raises(dsm.CheckpointError, match=r"experts.2.up_proj.weight: found a NaN or Inf"):
            load(tmp_path, wish(kind))


def test_odd_widths_are_refused_with_the_way_out(tmp_path):
    write_release(tmp_path, dsm.DeepseekV3Config(**(COMMON | V3 | SIZES | {"moe_intermediate_size": 63})))
    with pytest.raises(ValueError, match=r"moe_intermediate_size=63.*llm_int8_skip_modules"):
        load(tmp_path, wish())
    assert (
        type(experts_of(load(tmp_path, wish(llm_int8_skip_modules=["experts", "shared_experts"])))[0])
        is DeepseekExperts
    )


def test_without_bitsandbytes_it_is_named(folders, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    for fp8 in (False, True):
        with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
            load(folders["blocks", fp8], wish())
