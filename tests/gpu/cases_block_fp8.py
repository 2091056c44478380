"""Block-scaled FP8: products, casts and decoding against their definitions; casts to the bit."""

import pytest
import torch
import torch.nn.functional as F
from gpu.errors import check, poisoned

from modeling_deepseek_moe.cache import encode_latents
from modeling_deepseek_moe.ops import _latent_rows, block_fp8
from modeling_deepseek_moe.ops.block_fp8 import reference, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = (128, 128)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def quantised(n, k, seed=0):
    codes, scale = block_fp8.quantize(random(n, k, seed=seed))
    return codes, poisoned(scale)


def values(codes, scale, dtype):
    return reference.dequantize(codes, scale, dtype, BLOCK)


@pytest.mark.parametrize("rows, n, k", ((1, 136, 260), (19, 72, 132), (70, 40, 384)))
def test_linear(rows, n, k):
    for dtype in DTYPES if rows == 19 else DTYPES[:1]:
        x, bias, (codes, scale) = poisoned(random(rows, k).to(dtype)), random(n), quantised(n, k)
        found = triton.linear.cuda(x, codes, scale, bias)
        wanted = x.double() @ values(codes, scale, torch.float32).double().T + bias.double()
        check(found, F.linear(x, values(codes, scale, dtype), bias.to(dtype)), wanted)


def test_two_weights_on_one_x():
    x, first, second = poisoned(random(3, 260).bfloat16()), quantised(136, 260), quantised(40, 260, 1)
    for found, weight in zip(triton.linear_pair.cuda(x, *first, *second), (first, second), strict=True):
        wanted = x.double() @ values(*weight, torch.float32).double().T
        check(found, F.linear(x, values(*weight, x.dtype)), wanted)


@pytest.mark.parametrize("rows", (2, 18))
def test_gate_and_up(rows):
    x, gate, up = poisoned(random(rows, 260).bfloat16()), quantised(136, 260), quantised(136, 260, 1)
    found = triton.gate_up.cuda(x, *gate, *up)

    def defined(dtype, wide):
        g, u = (x.to(wide) @ values(*weight, dtype).to(wide).T for weight in (gate, up))
        return F.silu(g) * u

    check(found, defined(x.dtype, x.dtype), defined(torch.float32, torch.float64))


@pytest.mark.parametrize("native", (False, True), ids=("bf16", "fp8"))
@pytest.mark.parametrize("rows_of_b", (1, 128))
def test_gemm(native, rows_of_b, monkeypatch):
    monkeypatch.setattr(triton._triton, "capability", lambda device: 89 if native else 80)
    a, a_scale = block_fp8.quantize_tiles(random(33, 300))
    b = random(140, 300, seed=1)
    b, b_scale = block_fp8.quantize(b) if rows_of_b == 128 else block_fp8.quantize_tiles(b)
    row_scale = block_fp8.row_scales(b_scale, 140) if rows_of_b == 128 else b_scale
    found = triton.gemm.cuda(a, a_scale, b, b_scale, torch.float32)
    wanted = (
        block_fp8.dequantize_tiles(a, a_scale, torch.float64)
        @ block_fp8.dequantize_tiles(b, row_scale, torch.float64).T
    )
    check(found, reference.gemm(a, a_scale, b, row_scale), wanted)


@pytest.mark.parametrize("native", (False, True), ids=("by-shifts", "converted"))
@pytest.mark.parametrize("power_of_two", (False, True), ids=("free", "power"))
@pytest.mark.parametrize("across", (False, True), ids=("1x128", "128x1"))
def test_casts_to_the_bit(native, power_of_two, across, monkeypatch):
    monkeypatch.setattr(triton._triton, "capability", lambda device: 89 if native else 80)
    x = (random(40, 200) * torch.exp(4 * random(40, 200, seed=1))).bfloat16()
    x[3, :128], x[5, 7], x[6, 8] = 0, float("nan"), float("inf")
    x = x.t() if across else x
    codes, scale = triton.quantize_tiles.cuda(x, power_of_two, False)
    wanted, wanted_scale = block_fp8.quantize_tiles(x, power_of_two)
    assert torch.equal(scale.nan_to_num(-1), wanted_scale.nan_to_num(-1))
    assert torch.equal(codes.float().nan_to_num(1000), wanted.float().nan_to_num(1000))


def test_scales_tile_by_tile():
    x = random(7, 300)
    codes, scale = triton.quantize_tiles.cuda(x, False, False, True)
    wanted, wanted_scale = block_fp8.quantize_tiles(x)
    assert scale.stride() == (1, 8)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))


def test_swiglu_and_cast():
    x = random(5, 600).bfloat16()
    codes, scale = triton.quantize_tiles.cuda(x, True, True)
    gate, up = x.double().chunk(2, dim=1)
    wanted = F.silu(gate) * up
    same = block_fp8.quantize_tiles(F.silu(x[:, :300]) * x[:, 300:], True)
    made = [block_fp8.dequantize_tiles(*pair, torch.float64) for pair in ((codes, scale), same)]
    check(*made, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_all_codes(dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(150, 2)[:, :260].contiguous().view(torch.float8_e4m3fn)
    scale = random(2, 3).abs()
    found = triton.dequantize.cuda(codes, scale, dtype)
    assert torch.equal(found.nan_to_num(7), values(codes, scale, dtype).nan_to_num(7))


def test_rows_of_a_cache_are_decoded_where_they_lie(monkeypatch):
    """Codes and scales of a row lie next to each other; nothing of them is copied first."""
    rows = encode_latents(random(1, 1, 70, 200)).flatten(0, 2)
    codes, scales = _latent_rows.codes_and_scales(rows, 200)
    codes, places = codes.view(torch.float8_e4m3fn), []
    with monkeypatch.context() as patch:
        patch.setattr(triton, "launch", lambda *given, **_: places.extend(t.data_ptr() for t in given[3:5]))
        triton.dequantize.cuda(codes, scales, torch.bfloat16, 1)
    assert places == [codes.data_ptr(), scales.data_ptr()]
    found = triton.dequantize.cuda(codes, scales, torch.bfloat16, 1)
    assert torch.equal(found, reference.dequantize_tiles(codes, scales, torch.bfloat16))
    columns = codes.contiguous().t().contiguous().t()  # rows are no runs of bytes
    assert torch.equal(triton.dequantize.cuda(columns, scales, torch.bfloat16, 1), found)


def test_grids_have_room_for_many_rows(monkeypatch):
    """A grid may be 65,535 long on every side but the first."""
    grids = []
    monkeypatch.setattr(triton, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    codes, scale = triton.quantize_tiles.cuda(torch.zeros(1, 1).expand(1 << 22, 1), False, False)
    triton.dequantize.cuda(codes, scale, torch.bfloat16, 1)
    assert len(grids) > 2 and all(max(grid[1:]) < 1 << 16 for grid in grids)


@pytest.mark.parametrize("by_tile", (False, True))
def test_casts_in_several_grids(monkeypatch, by_tile):
    monkeypatch.setattr(triton, "MOST_BLOCKS", 2)
    x = random(70, 200)
    codes, scale = triton.quantize_tiles.cuda(x, False, False, by_tile)
    wanted, wanted_scale = block_fp8.quantize_tiles(x)
    assert torch.equal(scale, wanted_scale) and torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.long
def test_encodes_as_torch_does():
    every = torch.arange(0, 2**32, 3001, dtype=torch.int64).to(torch.int32).view(torch.float32)
    every = every[every.abs() <= 448][: 1 << 20]
    every = every[: len(every) // 128 * 128].view(-1, 128)
    ones = torch.full((len(every), 1), 448.0)  # the scale of each tile is then 1
    x = torch.cat((every[:, :127], ones), dim=1)
    codes, scale = triton.quantize_tiles.cuda(x, False, False)
    assert (scale == 1).all()
    assert torch.equal(codes.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("broken", ("codes", "scale", "x"))
def test_refuses_what_does_not_fit(broken):
    x, (codes, scale) = random(2, 132), quantised(40, 132)
    if broken == "codes":
        codes = codes.float()
    elif broken == "scale":
        scale = scale[:, :1]
    else:
        x = x[:, :-4]
    with pytest.raises(ValueError, match=r"\[\.\.\., K\]"):
        triton.linear.cuda(x, codes, scale, None)
