"""Block-scaled FP8 against its definition, spelled out in fp64: decode, dequantise, quantise, multiply."""

import math

import pytest
import torch
from releases import dequantize_independently, quantize_independently, same_bits
from torch import nn

from modeling_deepseek_moe import formats, use_backend
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.ops.block_fp8 import reference
from modeling_deepseek_moe.ops.quantized_linear import reference as tiled
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

FP8 = torch.float8_e4m3fn
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(FP8)
SHAPES = pytest.mark.parametrize(
    "shape",
    [(128, 128), (256, 384), (1, 1), (127, 129), (129, 127), (576, 200), (40, 300), (192, 64), (130, 1)],
    ids=lambda shape: "x".join(map(str, shape)),
)
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)


def e4m3(code: int) -> float:
    """The value of a code, from the format's definition: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no Inf."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 0xF, code & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def random_weight(shape, seed=0):
    """Random codes, all of them but NaN, and random positive scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = torch.rand(block_fp8.scale_shape(shape), generator=generator) * 1e-2 + 1e-4
    return codes.view(FP8), scales


def test_decode_every_code():
    wanted = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
    found = reference.decode(ALL_CODES)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[:-1], torch.arange(255) >= 128)  # zeros keep their sign


def test_decode_with_denormals_flushed():
    """Some libraries switch the processor to flush denormals; E4M3's own are ordinary numbers to it."""
    wanted = reference.decode(ALL_CODES)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found = reference.decode(ALL_CODES)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@FLOATS
def test_dequantize_every_code(dtype):
    codes = ALL_CODES.repeat(3, 1)  # [3, 256]: two blocks wide
    scales = torch.tensor([[0.37, 2.0**-9]])
    products = torch.tensor([[e4m3(code) * scales[0, code // 128].item() for code in range(256)]], dtype=torch.float64)
    found = block_fp8.dequantize(codes, scales, dtype)
    wanted = products.float().to(dtype).expand(3, -1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@FLOATS
@SHAPES
def test_dequantize(shape, dtype):
    codes, scales = random_weight(shape)
    found = block_fp8.dequantize(codes, scales, dtype)
    # fp64 holds the product exactly; it is rounded to fp32, then to the dtype
    assert torch.equal(found, dequantize_independently(codes, scales).float().to(dtype))


@pytest.mark.parametrize(
    "block", [(64, 32), (1, 128), (128, 1), (16, 300)], ids=lambda block: "x".join(map(str, block))
)
def test_other_blocks(block):
    weight = torch.randn(100, 200)
    codes, scales = block_fp8.quantize(weight, block)
    assert scales.shape == (math.ceil(100 / block[0]), math.ceil(200 / block[1]))
    wanted_codes, wanted_scales = quantize_independently(weight, block)
    assert same_bits(codes, wanted_codes)
    assert same_bits(scales, wanted_scales)
    spread = scales.repeat_interleave(block[0], 0)[:100].repeat_interleave(block[1], 1)[:, :200]
    assert torch.equal(block_fp8.dequantize(codes, scales, torch.float32, block), codes.float() * spread)


def test_codes_of_a_view():
    """A weight may be a slice of a stack, or transposed."""
    codes, _ = random_weight((200, 300))
    scales = torch.rand(3, 2) + 0.5
    assert torch.equal(
        block_fp8.dequantize(codes.T, scales, torch.float32),
        block_fp8.dequantize(codes.T.contiguous(), scales, torch.float32),
    )


@FLOATS
@SHAPES
def test_quantize(shape, dtype):
    weight = (torch.randn(shape) * torch.rand(shape).pow(4)).to(dtype)
    codes, scales = block_fp8.quantize(weight)
    wanted_codes, wanted_scales = quantize_independently(weight)
    assert same_bits(scales, wanted_scales)
    assert same_bits(codes, wanted_codes)
    assert same_bits(block_fp8.scales(weight), scales)
    # half a unit in the last place: 2^-4 of the value, or half the smallest step where that is more
    error = (dequantize_independently(codes, scales) - weight.double()).abs()
    step = (
        wanted_scales.double().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]] * 2**-9
    )
    assert (error <= torch.maximum(weight.double().abs() * 2**-4, step / 2) * (1 + 1e-6)).all()


def test_quantize_leaves_its_input_alone():
    weight = torch.randn(128, 256)
    before = weight.clone()
    block_fp8.quantize(weight)
    assert torch.equal(weight, before)


def test_quantize_of_zeros():
    weight = torch.randn(256, 200)
    weight[:128, :128] = 0
    weight[128:, 128:] = -0.0
    codes, scales = block_fp8.quantize(weight)
    assert scales[0, 0] == scales[1, 1] == 1
    back = block_fp8.dequantize(codes, scales, torch.float32)
    assert not back[:128, :128].any()
    assert not back[128:, 128:].any()
    assert back[:128, 128:].any()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-38, 1e-30, 1e30, 3.4e38])
def test_quantize_at_the_ends_of_fp32(magnitude):
    weight = torch.randn(130, 130).clamp(-1, 1) * magnitude
    codes, scales = block_fp8.quantize(weight)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    back = block_fp8.dequantize(codes, scales, torch.float64)
    assert torch.isfinite(back).all()
    assert (back - weight).abs().max() <= max(magnitude * 2**-4, 1e-44)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [(0, 0), (129, 130)])
@FLOATS
def test_quantize_refuses_what_is_not_finite(dtype, where, value):
    weight = torch.randn(130, 131).to(dtype)
    weight[where] = value
    for function in (block_fp8.quantize, block_fp8.scales):
        with pytest.raises(ValueError, match=r"found NaN or Inf .*\[130, 131\], wanted finite"):
            function(weight)


def test_quantize_refuses_what_fp32_cannot_hold():
    with pytest.raises(ValueError, match="NaN or Inf"):
        block_fp8.quantize(torch.full((2, 2), 1e300, dtype=torch.float64))


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int64)], ids=str
)
def test_quantize_refuses_other_tensors(weight):
    with pytest.raises(ValueError, match="wanted a floating-point matrix"):
        block_fp8.quantize(weight)


def test_dequantised_weight_keeps_its_codes():
    """FP8 → fp32 → FP8: the same codes; the same scales but for the last bit (fp32 cannot hold every 448 · scale)."""
    codes, scales = random_weight((300, 400))
    codes.view(torch.uint8)[::128, ::128] = 0x7E  # the largest code in every block, as a quantiser leaves it
    again, again_scales = block_fp8.quantize(block_fp8.dequantize(codes, scales, torch.float32))
    assert torch.equal(again.float(), codes.float())
    assert (again_scales.view(torch.int32) - scales.view(torch.int32)).abs().max() <= 1
    held = (scales * 448).double() == scales.double() * 448
    assert torch.equal(again_scales[held], scales[held])


@FLOATS
@SHAPES
def test_linear(shape, dtype, monkeypatch):
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 128 * 200)  # several tiles, the last one ragged
    codes, scales = random_weight(shape)
    weight = dequantize_independently(codes, scales)
    x = torch.randn(2, 3, shape[1]).to(dtype).requires_grad_()
    bias = torch.randn(shape[0]).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, shape[0]).to(dtype)
    y = block_fp8.linear(x, codes, scales, bias)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == bias.grad.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    for found, wanted, size in (
        (y, x.double() @ weight.T + bias.double(), x.double().abs() @ weight.T.abs() + bias.double().abs()),
        (x.grad, dy.double() @ weight, dy.double().abs() @ weight.abs()),
        (bias.grad, dy.double().sum((0, 1)), dy.double().abs().sum((0, 1))),
    ):
        assert ((found.double() - wanted).abs() <= 4 * eps * size).all()


def test_linear_gradient_by_finite_differences():
    codes, scales = random_weight((9, 140))
    x = torch.randn(2, 140, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: block_fp8.linear(x, codes, scales, bias), (x, bias))


def test_linear_without_rows():
    codes, scales = random_weight((200, 130))
    x = torch.empty(0, 130, requires_grad=True)
    y = block_fp8.linear(x, codes, scales)
    assert y.shape == (0, 200)
    y.sum().backward()
    assert x.grad.shape == (0, 130)


def test_linear_names_what_does_not_fit():
    codes, scales = random_weight((200, 130))
    x = torch.randn(2, 130)
    with pytest.raises(ValueError, match=r"131 features, the weight \[200, 130\]"):
        block_fp8.linear(torch.randn(2, 131), codes, scales)
    with pytest.raises(ValueError, match=r"\[2, 1\], wanted \[2, 2\]"):
        block_fp8.linear(x, codes, scales[:, :1])
    with pytest.raises(ValueError, match=r"found torch.float32 \[200, 130\]"):
        block_fp8.linear(x, codes.float(), scales)


@pytest.mark.parametrize("shape", [(1000, 1024), (300, 9000), (3, 20_000)], ids=["many-rows", "wide", "few-rows"])
def test_linear_never_dequantises_a_whole_weight(shape, monkeypatch):
    """Forward and backward each see every weight once, at most `TILE_ELEMENTS` (one row of blocks, if that is more)."""
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 1 << 18)
    made = []

    def dequantize(weight, *args, real=reference.dequantize):
        made.append(weight.numel())
        return real(weight, *args)

    monkeypatch.setattr(reference, "dequantize", dequantize)
    codes, scales = random_weight(shape)
    x = torch.randn(2, shape[1], requires_grad=True)
    with use_backend("reference"):
        y = block_fp8.linear(x, codes, scales)
    assert sum(made) == codes.numel()
    y.sum().backward()
    assert sum(made) == 2 * codes.numel()
    assert max(made) <= max(tiled.TILE_ELEMENTS, 128 * shape[1])


# QuantizedLinear, the layer on top.


def fp8_linear(rows=200, cols=130, bias=True):
    layer = QuantizedLinear(cols, rows, bias, formats.FP8)
    codes, scales = random_weight((rows, cols))
    layer.weight.data, layer.weight_scale_inv.data = codes, scales
    if bias:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.bfloat16().float(),
    ],
    ids=["to-bf16", "half", "double", "to-cpu-fp16", "there-and-back"],
)
def test_fp8_linear_keeps_its_dtypes(cast):
    model = nn.Sequential(fp8_linear(), nn.Linear(200, 4))
    codes, scales = model[0].weight.clone(), model[0].weight_scale_inv.clone()
    cast(model)
    assert same_bits(model[0].weight, codes)
    assert same_bits(model[0].weight_scale_inv, scales)
    assert isinstance(model[0].weight, nn.Parameter)
    assert isinstance(model[0].weight_scale_inv, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert not model[0].weight_scale_inv.requires_grad
    assert model[0].bias.dtype == model[1].weight.dtype
    dtype = model[1].weight.dtype
    assert model(torch.randn(3, 130, dtype=dtype)).dtype == dtype


def test_device_moves_keep_codes():
    layer = fp8_linear()
    assert layer.share_memory().weight.is_shared()
    assert layer.to_empty(device="meta").weight.is_meta


def test_fp8_linear_on_meta():
    layer = fp8_linear().to("meta")
    assert layer.weight.dtype == FP8
    assert layer.weight.is_meta
    assert layer.bfloat16().weight_scale_inv.dtype == torch.float32


def test_fp8_linear_under_autocast():
    layer = fp8_linear()
    x = torch.randn(3, 130)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_fp8_linear_dequantized():
    layer = fp8_linear()
    layer.requires_grad_(True)  # as a careless training script does
    weight = layer.dequantized(torch.float64)
    assert not weight.requires_grad
    assert torch.equal(
        weight, dequantize_independently(layer.weight.data, layer.weight_scale_inv.data).float().double()
    )
