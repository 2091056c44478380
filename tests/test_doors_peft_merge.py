"""Merging adapters into a model in memory: exact in fp32, and into codes by new ones for the blocks that change, alone."""

import copy
import pickle

import accelerate
import pytest
import torch
from adapters import ATTENTION, EXPERTS, adapted, dequantised, load, logits, stacked
from releases import SHAPES, same_bits, write_release
from test_int4_release import write_int4
from torch import nn
from transformers.distributed import DistributedConfig

from modeling_deepseek_moe import inspect_checkpoint
from modeling_deepseek_moe.adapters.merging import Merge, add_to_codes
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.formats import FORMATS
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.integrations import dequantize_module_weight  # noqa: E402

pytestmark = pytest.mark.tools

BOTH = {"target_modules": ATTENTION, "target_parameters": EXPERTS}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    write_release(folder, SHAPES["v3"](), fp8=True)
    return folder


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    """Codes wherever rows are whole groups, so that ``q_b_proj`` has none."""
    folder = tmp_path_factory.mktemp("int4") / "all"
    write_int4(folder, SHAPES["kimi"](), linears=True)
    return folder


@pytest.fixture(scope="module")
def mxfp4(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4") / "all"
    dequantised(release).save_pretrained(folder, quantize="mxfp4")
    return folder


def refused(model, message, *merges, **kwargs):
    """That merging is, and leaves every tensor as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in merges or (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge(**kwargs)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(same_bits(after[name], before[name]) for name in before)


def is_rounded(merged, exact):
    """Whether every weight that was adapted is that of the fp32 model, but for the rounding of E4M3."""
    for layer, wanted in zip(merged.base_model.layers, exact.base_model.layers, strict=True):
        pairs = [
            (getattr(layer.self_attn, name).dequantize(), getattr(wanted.self_attn, name).weight) for name in ATTENTION
        ]
        experts = getattr(layer.mlp, "experts", None)
        for index in range(experts.num_experts if isinstance(experts, StackedQuantizedExperts) else 0):
            own = [
                experts.weight_format.dequantize(*matrix, torch.float32) for matrix in experts.matrices(index).values()
            ]
            pairs += zip(
                own,
                (*wanted.mlp.experts.gate_up_proj[index].chunk(2), wanted.mlp.experts.down_proj[index]),
                strict=True,
            )
        if any(not 0.01 < (own - weight).norm() / weight.norm() < 0.04 for own, weight in pairs):
            return False
    return True


def test_fp32_experts_are_the_sum_to_the_last_bits(release):
    model = adapted(dequantised(release), **BOTH)
    experts = model.base_model.model.model.layers[1].mlp.experts
    stacks = dict(experts.get_base_layer().named_parameters())
    before, want = {name: stack.data.clone() for name, stack in stacks.items()}, logits(model)
    deltas = {
        wrapper.parameter_name: wrapper.get_delta_weight("default").double()
        for wrapper in (experts, experts.base_layer)
    }
    model.merge_adapter()
    for name, stack in stacks.items():
        torch.testing.assert_close(stack.double(), before[name].double() + deltas[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name, stack in stacks.items():
        torch.testing.assert_close(stack.data, before[name], rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.model.layers[1].mlp.experts is experts.get_base_layer() and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)


def test_codes_are_rounded_anew_said_and_given_back(release, caplog):
    model = adapted(stacked(release), **BOTH)
    want, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert "blocks have new ones. Rounding them lost" in caplog.text and caplog.text.count("Merged an adapter") == 1
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(stacked(release)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), state[name].contiguous().view(torch.uint8)), name
    assert torch.equal(logits(model), want)
    caplog.clear()
    back = model.merge_and_unload()
    assert torch.equal(logits(back), merged)
    assert is_rounded(back, adapted(dequantised(release), **BOTH).merge_and_unload())
    assert caplog.text.count("Merged an adapter") == 1


@pytest.mark.parametrize("dora", [False, True])
def test_merged_layers_are_saved_as_those_of_the_files(dora, release, tmp_path):
    model = adapted(load(release), target_modules=ATTENTION, use_dora=dora)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    found = logits(merged)
    assert is_rounded(
        merged, adapted(dequantised(release), target_modules=ATTENTION, use_dora=dora).merge_and_unload()
    )
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), found)
    if not dora:  # which merge-adapter refuses by name
        app(
            ["convert", "merge-adapter", str(release), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")],
            standalone_mode=False,
        )
        torch.testing.assert_close(logits(load(tmp_path / "out")), found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("base", ["release", "int4"])
def test_files_are_not_merged_into_and_nothing_is(base, request):
    folder = request.getfixturevalue(base)
    model = adapted(load(folder), **BOTH)
    model.add_adapter("attention", peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    want = logits(model)
    refused(model, r"mlp\.experts.*mapped files.*adapter default.*convert merge-adapter.*FineGrainedFP8Config")
    assert torch.equal(logits(model), want)
    model.merge_adapter(["attention"])  # of the experts' files nothing is wanted
    model.unmerge_adapter()
    for layer in model.base_model.model.model.layers[1:]:
        layer.mlp.experts.get_base_layer().restack("cpu")  # as a move to another device does
    merged = logits(model.merge_and_unload())
    assert torch.equal(merged, logits(adapted(stacked(folder), **BOTH).merge_and_unload()))


METHODS = {
    "LORA": lambda: peft.LoraConfig(r=2, target_modules=ATTENTION),
    "LORA with a bias": lambda: peft.LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True),
    "DORA": lambda: peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[]),
    "IA3 of inputs": lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=ATTENTION),
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=ATTENTION),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=ATTENTION),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["o_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=2, total_step=10, target_modules=ATTENTION),
}


def tuned(model, *methods):
    """With adapters that do something, the same ones for every model that has them."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = nn.Parameter(
            torch.randn(layer.self_attn.o_proj.out_features, generator=generator)
        )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, METHODS[methods[0]]()).eval()
    for method in methods[1:]:
        model.add_adapter("second", METHODS[method]())
    names = list(model.peft_config)
    model.base_model.set_adapter(names)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def layers_of(model):
    """As a loop of peft's own finds them."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def is_as_on_floats(merged, exact, roundings=1):
    """Whether every adapted weight is that of the dequantised model, but for some roundings, and every bias is its bias."""
    pairs = zip(layers_of(merged), layers_of(exact), strict=True)
    for base, wanted in ((own.get_base_layer(), other.get_base_layer()) for own, other in pairs):
        weight = wanted.weight.data
        if isinstance(base, QuantizedLinear):
            row = base.weight_format
            fresh = (row.dequantize(*row.quantize(weight), torch.float32) - weight).norm()
        else:
            fresh = 1e-6 * weight.norm()
        lost = (dequantize_module_weight(base) - weight).norm()
        if lost > 1.001 * roundings * fresh or (base.bias is not None and not torch.allclose(base.bias, wanted.bias)):
            return False
    return True


@pytest.mark.parametrize("base", ["release", "int4", "mxfp4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_merged_layer_by_layer_and_by_the_model(method, base, request, caplog):
    folder = request.getfixturevalue(base)
    if base != "release" and method in ("LOHA", "LOKR"):  # which read the shape of codes
        with pytest.raises(
            ValueError, match=rf"_proj: found {base.upper()}-resident codes.*peft_type={method}; .*IA3, VERA:"
        ):
            tuned(load(folder), method)
        return
    model, exact = tuned(load(folder), method), tuned(dequantised(folder), method)
    exact.merge_adapter()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with model.disable_adapter():
        bare = logits(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=method == "IA3")
    assert is_as_on_floats(model, exact) and caplog.text.count("Merged an adapter") == 1
    merged = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), bare, rtol=1e-3, atol=1e-3)
    codes = [name for name, tensor in state.items() if tensor.dtype not in (torch.float32, torch.bfloat16)]
    assert codes and all(same_bits(model.state_dict()[name], state[name]) for name in codes)
    # FP8's tensors cannot be pickled
    again = pickle.loads(pickle.dumps(model)) if base == "int4" else model
    for made in (copy.deepcopy(model), again):
        torch.testing.assert_close(logits(made.merge_and_unload()), merged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("methods", [("LORA", "DORA"), ("DORA", "DORA"), ("IA3", "IA3 of inputs")])
def test_several_adapters_are_merged_in_their_order(methods, release):
    model, exact = tuned(load(release), *methods), tuned(dequantised(release), *methods)
    exact.merge_adapter()
    want, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert is_as_on_floats(model, exact)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    exact.unmerge_adapter()
    for name in model.peft_config:  # in turn, and rounded in turn
        model.merge_adapter([name])
        exact.merge_adapter([name])
    assert all(layer.merged_adapters == list(model.peft_config) for layer in layers_of(model))
    assert is_as_on_floats(model, exact, roundings=len(methods))
    model.unmerge_adapter()
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_a_layer_cannot_be_merged_with_is_refused_by_name(release):
    for model in (load(release), dequantised(release)):
        refused(
            adapted(model, target_modules=ATTENTION, lora_bias=True), "q_b_proj: adapter default: found lora_bias=True"
        )
    mixed = peft.get_peft_model(load(release), METHODS["LORA"](), mixed=True)
    mixed.add_adapter("second", METHODS["LOHA"]())
    mixed.set_adapter(["default", "second"])
    message = "found a layer of peft.tuners.loha.layer around one .*wanted adapters of one method"
    refused(mixed, message, mixed.merge_adapter, mixed.merge_and_unload, layers_of(mixed)[0].merge)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_layer_that_cannot_be_merged_is_found_before_the_first_is(int4, safe_merge):
    model = adapted(stacked(int4), **BOTH)
    experts = model.base_model.model.model.layers[2].mlp.experts
    experts.lora_B["default"].weight.data[3, 5] = torch.nan
    refused(model, r"layers\.2\.mlp\.experts: adapter default: found NaN or Inf in lora_B", safe_merge=safe_merge)
    experts.lora_B["default"].weight.data[3, 5] = 3e38
    experts.lora_A["default"].weight.data[:] = 3e38
    if safe_merge:
        before = {name: tensor.clone() for name, tensor in experts.get_base_layer().state_dict().items()}
        with pytest.raises(ValueError, match="NaN or Inf"):
            experts.merge(safe_merge=True)
        assert all(same_bits(tensor, before[name]) for name, tensor in experts.get_base_layer().state_dict().items())


def test_offloaded_adapters_are_merged(release):
    model = adapted(dequantised(release), target_modules=ATTENTION)
    want = logits(adapted(dequantised(release), target_modules=ATTENTION).merge_and_unload())
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].weight.is_meta
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), want, rtol=0, atol=0)


def test_parts_of_ranks_are_not_merged_into(release):
    model = adapted(dequantised(release), target_modules=ATTENTION)
    base = model.get_base_model()
    base.config.distributed_config, base._is_distributed_loading_by_transformers = DistributedConfig(tp_size=2), True
    refused(model, r"tp_size=2: found weights that ranks have parts of.*convert merge-adapter")


def test_copies_and_pickles_merge_by_themselves(release):
    model = adapted(dequantised(release), **BOTH)
    want = logits(adapted(dequantised(release), **BOTH).merge_and_unload())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert type(made.base_model) is type(model.base_model)
        assert torch.equal(logits(made.merge_and_unload()), want)


def test_codes_are_given_back_where_the_layer_is_now(release):
    layer = adapted(load(release), target_modules=["o_proj"]).base_model.model.model.layers[0].self_attn.o_proj
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert {tensor.device.type for tensor in layer.base_layer.parameters()} == {"meta"}


def test_int4_merged_in_memory_is_saved_and_loaded(int4, tmp_path):
    merged = adapted(stacked(int4), **BOTH).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert not inspect_checkpoint(tmp_path / "merged").findings
    again = load(tmp_path / "merged")
    assert torch.equal(logits(stacked(tmp_path / "merged")), logits(merged))
    assert not torch.allclose(logits(again), logits(load(int4)), atol=1e-2)


def test_int4_scales_that_peft_prepared_are_those_of_the_files(int4, tmp_path):
    """`prepare_model_for_kbit_training` sets the data of all 16-bit parameters to fp32, scales too."""
    want = logits(stacked(int4))
    model = peft.prepare_model_for_kbit_training(stacked(int4))
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)
    scales = [name for name in model.state_dict() if name.endswith("_scale")]
    assert scales and all(model.state_dict()[name].dtype == torch.bfloat16 for name in scales)
    assert torch.equal(logits(model), want)
    peft.prepare_model_for_kbit_training(model).save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(int4)))
    trained = adapted(peft.prepare_model_for_kbit_training(stacked(int4)), **BOTH)
    assert torch.equal(logits(trained), logits(adapted(stacked(int4), **BOTH)))
    assert torch.equal(logits(trained.merge_and_unload()), logits(adapted(stacked(int4), **BOTH).merge_and_unload()))


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_blocks_that_are_not_touched_keep_their_bytes(row):
    generator = torch.Generator().manual_seed(0)
    n, k = 2 * row.block[0] + 8, 3 * max(row.block[1], 64)
    codes, scales = row.quantize(torch.randn(n, k, generator=generator))
    difference = torch.zeros(n, k)
    difference[row.block[0], :3] = torch.tensor([0.5, -2.0, 0.1])
    merge = Merge()
    new_codes, new_scales = add_to_codes(row, codes, scales, difference, merge)
    before, after = (row.dequantize(*pair, torch.float32) for pair in ((codes, scales), (new_codes, new_scales)))
    rows, columns = slice(row.block[0], 2 * row.block[0]), slice(0, row.block[1])
    wanted = (before + difference)[rows, columns]
    fresh = row.dequantize(*row.quantize(wanted.contiguous()), torch.float32)
    lost = (after[rows, columns] - wanted).norm()
    assert 0 < lost <= (fresh - wanted).norm()  # the block's old scale stays where it loses less
    rest = torch.ones(n, k, dtype=torch.bool)
    rest[rows, columns] = False
    assert torch.equal(after[rest], before[rest])
    assert merge.touched == 1 and merge.error > 0
    same = add_to_codes(row, codes, scales, torch.zeros(n, k))
    assert torch.equal(same[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(same[1], scales)
