"""Four-bit codes and scales: bitsandbytes' bits, compressed-tensors' packing, and the OCP MX specification's rounding."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.formats import FORMATS
from modeling_deepseek_moe.ops import four_bit
from modeling_deepseek_moe.ops._native import unavailable_reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((128, 256), (333, 1408), (3, 64))


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.randn(shape, generator=generator) * torch.rand((shape[0], 1), generator=generator)
    values[0, :64] = 0  # a whole group
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bits_of_bitsandbytes(kind, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    for shape in SHAPES:
        weight = weight_of(shape, dtype)
        wanted, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        codes, scales = four_bit.encode(weight, (1, 64), kind=kind)
        assert torch.equal(codes.view(-1, 1), wanted) and torch.equal(scales.view(-1), state.absmax)
        values = four_bit.decode(codes, scales, dtype, (1, 64), kind=kind)
        assert torch.equal(values, functional.dequantize_4bit(wanted, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_bits_of_bitsandbytes(kind, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    for shape in (*SHAPES, (4, 128)):  # the last: one run, not full
        weight = weight_of(shape, dtype) if shape != (4, 128) else torch.zeros(shape, dtype=dtype)
        wanted, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        codes, scales = four_bit.encode(weight, (1, 64), kind=kind)
        nested = four_bit.nest(scales)
        assert torch.equal(nested.codes.view(-1), state.absmax)
        assert torch.equal(nested.absmax, state.state2.absmax) and torch.equal(nested.offset, state.offset)
        assert torch.equal(nested.table, state.state2.code)
        values = four_bit.decode(codes, nested, dtype, (1, 64), kind=kind)
        assert torch.equal(values, functional.dequantize_4bit(wanted, state))


@pytest.mark.parametrize("row", [row for row in FORMATS if row.name in four_bit.KINDS], ids=lambda row: row.name)
def test_a_format_decodes_by_the_engine_to_the_bits_of_the_definition(row):
    codes, plain = row.encode(weight_of((96, 320), torch.float32), row.block)
    for scales in (plain, four_bit.nest(plain)) if row.name in ("nf4", "fp4") else (plain,):
        for dtype in (*DTYPES, torch.float64):
            wanted = four_bit.decode(codes, scales, dtype, row.block, kind=row.name)
            found = row.dequantize(codes, scales, dtype)
            assert found.dtype == dtype and torch.equal(found, wanted)
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Calls():
        row.dequantize(codes, plain, torch.bfloat16)
    assert any("four_bit_dequantize" in name for name in called) == (unavailable_reason() is None)
    with use_backend("reference"), Calls():
        called.clear()
        row.dequantize(codes, plain, torch.bfloat16)
    assert not any("four_bit_dequantize" in name for name in called)


def test_nested_scales_stand_for():
    codes = torch.arange(3 * 200).remainder(256).to(torch.uint8).view(3, 200)
    nested = four_bit.NestedScales(codes, torch.tensor([1.0, 2.0, 4.0]), torch.arange(256.0), torch.tensor(0.5))
    found = four_bit.expand(nested)
    assert found.shape == (3, 200)
    for row, column in ((0, 0), (1, 55), (1, 56), (2, 111), (2, 112)):  # 255 | 256 and 511 | 512
        number = 200 * row + column
        assert found[row, column] == (number % 256) * 2.0 ** (number // 256) + 0.5


def test_int4_written_down():
    """Offset by 8, the first column lowest; the scale is amax / 7.5 in bf16."""
    weight = torch.tensor([[7.5, -7.5, 0.0, 1.0, -1.0, 2.5, 3.5, -7.0] + [0.0] * 24])
    weight = torch.cat([weight, torch.zeros_like(weight)])
    codes, scales = four_bit.encode(weight, (1, 32), kind="int4")
    assert codes.dtype == torch.int32 and codes.shape == (2, 4) and scales.dtype == torch.bfloat16
    scale = torch.tensor(1.0)
    assert scales.tolist() == [[scale.item()], [1.0]]
    wanted = [7, -8, 0, 1, -1, 2, 4, -7]  # ties to even, and within -8 to 7
    assert [(codes[0, 0].item() >> (4 * i) & 15) - 8 for i in range(8)] == wanted
    assert codes[1].tolist() == [0x88888888 - (1 << 32)] * 4
    values = four_bit.decode(codes, scales, torch.float32, (1, 32), kind="int4")
    assert torch.equal(values[0, :8], torch.tensor(wanted) * scale.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int4_of_compressed_tensors(dtype):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    arguments = quantization.QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = weight_of((96, 256), dtype)
    groups = weight.unflatten(1, (-1, 32))
    scales, _ = quantization.utils.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    codes, found = four_bit.encode(weight, (1, 32), kind="int4")
    used = groups.abs().amax(-1) > 0  # it gives zeros a scale of epsilon, we of 1
    assert torch.equal(found[used], scales.bfloat16()[used]) and (~used).sum() == 2
    packed = compressors.PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": found}, scheme)
    assert torch.equal(packed["weight_packed"], codes) and packed["weight_shape"].tolist() == [96, 256]
    values = compressors.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert torch.equal(four_bit.decode(codes, found, torch.bfloat16, (1, 32), kind="int4"), values)


def nearest_e2m1(value: float) -> float:
    """To the nearest, of two as near the one with an even code, at most 6."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    size = min(abs(value), 6.0)
    code = min(range(8), key=lambda code: (abs(values[code] - size), code % 2))
    return math.copysign(values[code], value)


@pytest.mark.parametrize("exponent", [-140, -120, -3, 0, 100, 125])
def test_mxfp4_by_the_specification(exponent):
    torch.manual_seed(0)
    weight = torch.ldexp(torch.randn(16, 64), torch.tensor(exponent))
    weight[0, :16] = torch.ldexp(
        torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 2), torch.tensor(exponent)
    )
    weight[0, 8:16] *= -1
    weight[0, 16:32], weight[1, :32] = 0.0, 0.0
    codes, scales = four_bit.encode(weight, (1, 32), kind="mxfp4")
    assert codes.dtype == torch.uint8 and codes.shape == (16, 32)
    assert scales.dtype == torch.float8_e8m0fnu and scales.shape == (16, 2)
    found = four_bit.decode(codes, scales.view(torch.uint8), torch.float32, (1, 32), kind="mxfp4")
    for row in range(16):
        for start in (0, 32):
            group = weight[row, start : start + 32].double()
            amax = group.abs().max().item()
            shared = max(-127, math.frexp(amax)[1] - 3) if amax else 0
            assert scales[row, start // 32].view(torch.uint8).item() == shared + 127
            wanted = [nearest_e2m1(value * 2.0**-shared) * 2.0**shared for value in group.tolist()]
            assert found[row, start : start + 32].tolist() == torch.tensor(wanted, dtype=torch.float32).tolist()
    assert torch.equal(found.signbit(), weight.signbit())


def test_the_two_orders_of_a_byte():
    """0x21: INT4 and MXFP4 begin with the 1, NF4 and FP4 with the 2."""
    codes = torch.full((1, 32), 0x21, dtype=torch.uint8)
    for kind, wanted in (("int4", [-7, -6]), ("mxfp4", [0.5, 1]), ("nf4", [-0.5250730514526367, -0.6961928009986877])):
        group = four_bit.KINDS[kind].group
        values = four_bit.decode(codes, torch.ones(1, 64 // group), torch.float32, (1, group), kind=kind)
        assert values[0, :2].tolist() == pytest.approx(wanted, abs=0)
    fp4 = four_bit.decode(codes, torch.full((1, 1), 12.0), torch.float32, (1, 64), kind="fp4")
    assert fp4[0, :2].tolist() == [8.0, 0.0625]


@pytest.mark.parametrize("kind", four_bit.KINDS)
def test_bad_input(kind):
    group = four_bit.KINDS[kind].group
    weight = torch.randn(4, 2 * group)
    with pytest.raises(ValueError, match=f"whole groups of {group}"):
        four_bit.encode(weight[:, 1:], (1, group), kind=kind)
    with pytest.raises(ValueError, match="matrix to quantise"):
        four_bit.encode(weight[0], (1, group), kind=kind)
    with pytest.raises(ValueError, match="finite values"):
        four_bit.encode(torch.where(weight > 1, torch.nan, weight), (1, group), kind=kind)
    codes, scales = four_bit.encode(weight, (1, group), kind=kind)
    for wrong in (scales[:-1], scales[:, :-1], scales.repeat(1, 2)):
        with pytest.raises(ValueError, match=f"a scale for {group} columns"):
            four_bit.decode(codes, wrong, torch.float32, (1, group), kind=kind)
