"""Codes and scales of a weight that changed in places: blocks that keep their values keep their bytes."""

from dataclasses import replace

import pytest
import torch
from releases import dequantize_independently, quantize_independently, same_bits
from test_formats import INT4, INT8, NEAR_FP8

from modeling_deepseek_moe.formats import FORMATS, FP8
from modeling_deepseek_moe.ops import four_bit

UE8M0 = next(row for row in FORMATS if row.name == "fp8_ue8m0")
ROWS = [*FORMATS, INT8, INT4, NEAR_FP8["exponents for scales"]]
SHAPE = (200, 320)  # ragged at both edges in blocks of 128


def stored(row, shape=SHAPE):
    """Codes and scales that the quantiser would not choose: none of the blocks has its largest code at the top."""
    torch.manual_seed(0)
    codes, scales = row.quantize(torch.randn(shape) * 0.03)
    return codes, (scales.float() * 2).to(scales.dtype)


def blocks_of(row, tensor):
    """Every block of values as its rows and columns."""
    for i in range(-(-tensor.shape[0] // row.block[0])):
        for j in range(-(-tensor.shape[1] // row.block[1])):
            rows = slice(i * row.block[0], (i + 1) * row.block[0])
            yield i, j, rows, slice(j * row.block[1], (j + 1) * row.block[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_only_blocks_that_change_are_written(row, dtype):
    codes, scales = stored(row)
    before = codes.clone(), scales.clone()
    weight = row.dequantize(codes, scales, dtype)
    weight[5, 7] += 0.25
    weight[199, 319] -= 0.25
    new_codes, new_scales, changed = row.requantize(codes, scales, weight)
    assert same_bits(codes, before[0]) and same_bits(scales, before[1])
    places = {(5 // row.block[0], 7 // row.block[1]), (199 // row.block[0], 319 // row.block[1])}
    assert {tuple(place) for place in changed.nonzero().tolist()} == places
    fresh = row.dequantize(*row.quantize(weight), torch.float32)
    old, found = row.dequantize(codes, scales, torch.float32), row.dequantize(new_codes, new_scales, torch.float32)
    per = codes.shape[1] / weight.shape[1]  # elements of codes a value
    for i, j, rows, columns in blocks_of(row, weight):
        if (i, j) in places:
            error, *others = ((weight - values)[rows, columns].norm() for values in (found, fresh, old))
            assert error <= min(others) * (1 + 1e-6)
            continue
        own = slice(int(columns.start * per), int(columns.stop * per))
        assert same_bits(new_codes[rows, own].contiguous(), codes[rows, own].contiguous())
        assert same_bits(new_scales[i : i + 1, j : j + 1].contiguous(), scales[i : i + 1, j : j + 1].contiguous())


@pytest.mark.parametrize("row", [row for row in ROWS if row.encode_with], ids=lambda row: row.name)
def test_small_changes_do_not_round_all_values_again(row):
    """Those below half a step leave the codes as they are, so that the error is no larger than the change."""
    codes, scales = row.quantize(torch.randn(SHAPE) * 0.03)
    weight = row.dequantize(codes, scales, torch.float32)
    change = torch.randn(SHAPE) * 1e-5
    new_codes, new_scales, changed = row.requantize(codes, scales, weight + change)
    error = (row.dequantize(new_codes, new_scales, torch.float32) - weight - change).norm()
    assert changed.all() and error <= change.norm() * (1 + 1e-4)
    again = row.dequantize(*row.quantize(weight + change), torch.float32)
    assert error <= (again - weight - change).norm() * (1 + 1e-4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_values_that_outgrow_their_scale_get_another(row):
    codes, scales = row.quantize(torch.randn(SHAPE) * 0.03)
    weight = row.dequantize(codes, scales, torch.float32) * 50
    new_codes, new_scales, _ = row.requantize(codes, scales, weight)
    fresh = row.quantize(weight)
    assert (row.dequantize(new_codes, new_scales, torch.float32) - weight).norm() <= (
        row.dequantize(*fresh, torch.float32) - weight
    ).norm() * (1 + 1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_changes_where_nothing_changed(row):
    codes, scales = stored(row)
    again, same, changed = row.requantize(codes, scales, row.dequantize(codes, scales, torch.float32))
    assert same_bits(again, codes) and same_bits(same, scales) and not changed.any()


def test_changed_blocks_are_no_further_than_the_definition_s():
    codes, scales = stored(FP8)
    wanted = dequantize_independently(codes, scales)
    wanted[:128, 128:256] += 0.01
    found = dequantize_independently(*FP8.requantize(codes, scales, wanted.float())[:2])
    best = dequantize_independently(*quantize_independently(wanted.float()))
    block = slice(0, 128), slice(128, 256)
    assert (found - wanted)[block].norm() <= 1.001 * (best - wanted)[block].norm()


def test_scales_stay_powers_of_two():
    codes, scales = UE8M0.quantize(torch.randn(SHAPE))
    weight = UE8M0.dequantize(codes, scales, torch.float32)
    weight[:, 130] *= 3.3
    _, new, changed = UE8M0.requantize(codes, scales, weight)
    assert changed[:, 1].all() and not changed[:, [0, 2]].any()
    assert torch.equal(torch.frexp(new).mantissa, torch.full_like(new, 0.5))


def test_what_cannot_be_requantised():
    codes, scales = stored(FP8)
    weight = FP8.dequantize(codes, scales, torch.float32)
    with pytest.raises(ValueError, match=r"FP8: found torch.float32 \[200, 319\], wanted floats \[200, 320\]"):
        FP8.requantize(codes, scales, weight[:, :-1])
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        FP8.requantize(codes, scales, weight)
    odd = replace(INT4, block=(1, 20))
    codes, scales = odd.quantize(torch.ones(2, 40))
    with pytest.raises(ValueError, match="share elements"):
        odd.requantize(codes, scales, torch.rand(2, 40))


@pytest.mark.parametrize("change", [1e-3, 1.0], ids=["within the run's scale", "beyond it"])
def test_nested_scales_stay_nested(change):
    """Other blocks keep their bytes, but for the scales of a run of 256 in which a new one is beyond them all."""
    row = next(row for row in FORMATS if row.name == "nf4")
    codes, scales = row.quantize(torch.randn(SHAPE) * 0.03)
    nested = four_bit.nest(scales)
    weight = row.dequantize(codes, nested, torch.float32)
    weight[3, 70] += change
    new_codes, new_scales, changed = row.requantize(codes, nested, weight)
    assert changed[3, 1] and not changed.view(-1)[256:].any()
    assert torch.equal(new_scales.offset, nested.offset) and torch.equal(new_scales.absmax[1:], nested.absmax[1:])
    found, wanted = row.dequantize(new_codes, new_scales, torch.float32), row.dequantize(codes, nested, torch.float32)
    fresh, fresh_scales = row.quantize(weight)
    fresh = row.dequantize(fresh, four_bit.nest(fresh_scales), torch.float32)
    assert (found - weight)[3, 64:128].norm() <= 1.02 * (fresh - weight)[3, 64:128].norm()
    if change < 1:
        assert changed.nonzero().tolist() == [[3, 1]] and torch.equal(new_scales.absmax, nested.absmax)
        assert (new_scales.codes != nested.codes).sum() <= 1
    apart = found != wanted
    assert not apart.view(-1, 64)[~changed.view(-1)].any()
    own = apart.any() and (found - wanted).view(-1, 64)[256:].any()
    assert not own
