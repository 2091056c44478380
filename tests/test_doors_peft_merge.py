"""Merging adapters into a model in memory: exact in fp32, and into codes by new ones for the blocks that change, alone."""

import pytest
import torch
from adapters import ATTENTION, EXPERTS, adapted, dequantised, load, logits, stacked
from releases import SHAPES, write_release

from modeling_deepseek_moe.adapters.merging import Merge, add_to_codes
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.formats import FORMATS
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.tools

BOTH = {"target_modules": ATTENTION, "target_parameters": EXPERTS}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    write_release(folder, SHAPES["v3"](), fp8=True)
    return folder


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


def test_files_are_not_merged_into_and_nothing_is(release):
    model = adapted(load(release), **BOTH)
    want = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            ValueError, match=r"mlp\.experts.*mapped files.*convert merge-adapter.*FineGrainedFP8Config"
        ):
            merge()
        assert torch.equal(logits(model), want)


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
