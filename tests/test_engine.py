"""The CPU engine on every instruction set of this CPU: linear layers, norms, and conversion from and to FP8.

The kernels differ by tokens (one, two, four, few, many), by columns left in a block, and by rows left in a panel.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from engine_cases import (
    FP8,
    INSTRUCTION_SETS,
    assert_linear,
    distance,
    every_isa,
    exact,
    guarded,
    needs_engine,
    normal_fp8,
    random_fp8,
)
from releases import same_bits

from modeling_deepseek_moe import BackendError, use_backend
from modeling_deepseek_moe.ops import _native, block_fp8, linear, rms_norm
from modeling_deepseek_moe.ops.block_fp8 import reference
from modeling_deepseek_moe.ops.linear import cpu as linear_cpu

pytestmark = needs_engine

needs_amx = pytest.mark.skipif("amx" not in INSTRUCTION_SETS, reason="this CPU has no AMX")
ACTIVATIONS = pytest.mark.parametrize("dtype", _native.ACTIVATIONS, ids=str)
TOKENS = (1, 2, 3, 4, 5, 8, 11, 12, 15, 16, 17, 33)
COLUMNS = (1, 2, 3, 7, 16, 31, 33, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 255, 257, 300, 391, 576)
ROWS = (1, 2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 127, 129, 200, 257, 305)
ODD = range(1, 401, 2)


def check_fp8_linear(rows, columns, tokens, dtype, bias=False):
    codes, scale = random_fp8((rows, columns), seed=rows * 1000 + columns)
    weight = exact(codes, scale)
    b = torch.randn(rows).to(dtype) if bias else None
    for t in tokens:
        x = torch.randn(t, columns).to(dtype)
        y = block_fp8.linear(x, codes, scale, b)
        assert y.dtype == dtype and y.shape == (t, rows)
        assert_linear(y, x, weight, b)


def check_bf16_linear(rows, columns, tokens, dtype, bias=False):
    weight = torch.randn(rows, columns).bfloat16()
    b = torch.randn(rows).to(dtype) if bias else None
    for t in tokens:
        x = torch.randn(t, columns).to(dtype)
        y = linear_cpu.linear(x, weight, b)
        assert y.dtype == dtype and y.shape == (t, rows)
        assert_linear(y, x, weight.double(), b)


CHECKS = pytest.mark.parametrize("check", [check_fp8_linear, check_bf16_linear], ids=["fp8", "bf16"])


@every_isa
@ACTIVATIONS
@CHECKS
def test_linear_columns(check, dtype, isa):
    """What is left of a block, for every number of tokens that has a path of its own."""
    with use_backend(isa):
        for columns in COLUMNS:
            check(19, columns, TOKENS, dtype)


@every_isa
@ACTIVATIONS
@CHECKS
def test_linear_rows(check, dtype, isa):
    with use_backend(isa):
        for rows in ROWS:
            check(rows, 131, (1, 2, 3, 7, 16, 17, 20), dtype, bias=True)


@every_isa
@CHECKS
def test_linear_many_tokens(check, isa):
    """Tokens are taken 512 at a time."""
    with use_backend(isa):
        check(70, 200, (512, 513, 1030), torch.bfloat16, bias=True)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@CHECKS
def test_linear_of_a_release(check, dtype, isa):
    """Lengths of V2-Lite's and V3's rows; those of several thousand columns are taken a segment at a time."""
    with use_backend(isa):
        for rows, columns in ((40, 1408), (24, 7168), (20, 2049), (150, 2048)):
            check(rows, columns, (1, 2, 4, 7, 16), dtype)


@every_isa
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1100), (1, 4300), (3, 1100), (16, 1100), (17, 1100), (40, 1100)])
def test_one_rare_code_among_normal_ones(tokens, columns, isa):
    """Zeros, subnormals and NaN go another way than what they lie among; of rows read together, one is spoiled."""
    rows = 70
    x = torch.randn(tokens, columns).bfloat16()
    with use_backend(isa):
        for place, code in enumerate((None, 0x00, 0x80, 0x01, 0x87, 0x07, 0x7F, 0xFF)):
            codes, scale = normal_fp8((rows, columns), seed=place)
            row, column = 9 * place, (137 * place + 511) % columns
            if code is not None:
                codes.view(torch.uint8)[row, column] = code
            y = block_fp8.linear(x, codes, scale)
            spoiled = torch.zeros(rows, dtype=torch.bool)
            spoiled[row] = code is not None and code & 0x7F == 0x7F
            assert (y.isnan() == spoiled).all()
            assert_linear(y[:, ~spoiled], x, exact(codes, scale)[~spoiled])


@needs_amx
@pytest.mark.parametrize("tokens", [2, 3, 5, 16, 17, 33, 64])
def test_tiles_do_not_depend_on_other_tokens(tokens):
    """Nor on what lies after the last token of a group: the same bits next to any others, and next to NaN."""
    codes, scale = normal_fp8((300, 1500))
    x = torch.randn(80, 1500).bfloat16()
    with use_backend("cpu:amx"):
        whole = block_fp8.linear(x, codes, scale)
        assert same_bits(block_fp8.linear(x[:tokens], codes, scale), whole[:tokens])
        x[tokens - 1] = torch.nan
        assert same_bits(block_fp8.linear(x, codes, scale)[: tokens - 1], whole[: tokens - 1])


@every_isa
@pytest.mark.parametrize("kind", [FP8, torch.bfloat16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_rows_do_not_depend_on_their_neighbours(tokens, kind, isa):
    """Rows are read several at a time, which ones depends on how many there are; long rows are longer than what is fetched."""
    for columns in (131, 1408, 2600):
        codes, scale = normal_fp8((200, columns))
        weight = torch.randn(200, columns).bfloat16()
        x = torch.randn(tokens, columns).bfloat16()
        with use_backend(isa):
            whole = block_fp8.linear(x, codes, scale) if kind == FP8 else linear.linear(x, weight)
            for rows in (1, 7, 8, 15, 64, 71, 127, 128, 199):
                scale_rows = -(-rows // 128)
                part = (
                    block_fp8.linear(x, codes[:rows], scale[:scale_rows])
                    if kind == FP8
                    else linear.linear(x, weight[:rows])
                )
                assert same_bits(part, whole[:, :rows])


@pytest.mark.long
@every_isa
@ACTIVATIONS
@CHECKS
def test_linear_sweep(check, dtype, isa):
    with use_backend(isa):
        for size in ODD:
            check(21, size, (*TOKENS, 50), dtype)
            check(size, 77, (*TOKENS, 50), dtype, bias=True)
        for tokens in range(1, 70):
            check(65, 259, (tokens,), dtype)
        check(576, 7168, (1, 2, 3, 4, 11, 12, 15, 16, 17, 512, 513), dtype)


@every_isa
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("shape", [(576, 1408), (200, 300)], ids=str)
def test_linear_is_better_than_torch(shape, tokens, isa):
    """In bf16: no further from the fp64 result than torch's product with the dequantised weight."""
    codes, scale = random_fp8(shape)
    x = torch.randn(tokens, shape[1]).bfloat16()
    wanted = x.double() @ exact(codes, scale).T
    torch_error = distance(F.linear(x, reference.dequantize(codes, scale, torch.bfloat16, (128, 128))), wanted)
    with use_backend(isa):
        assert distance(block_fp8.linear(x, codes, scale), wanted) <= torch_error
        assert distance(block_fp8.linear(x.float(), codes, scale), wanted) <= 1e-6


@every_isa
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 12, 16, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_codes(dtype, tokens, isa):
    """A NaN code makes its row's result NaN, and no other; so does one that meets activations that are zero."""
    codes, scale = random_fp8((150, 2300))
    places = [(0, 0), (3, 127), (4, 128), (17, 2299), (63, 1000), (64, 2200), (149, 2298)]
    for i, (row, column) in enumerate(places):
        codes.view(torch.uint8)[row, column] = 0xFF if i % 2 else 0x7F
    x = torch.randn(tokens, 2300).to(dtype)
    x[:, 2298:] = 0
    with use_backend("reference"):
        wanted = block_fp8.linear(x, codes, scale).isnan()
    with use_backend(isa):
        found = block_fp8.linear(x, codes, scale).isnan()
    assert torch.equal(found, wanted)
    assert found.any(0).nonzero().flatten().tolist() == [row for row, _ in places]


@every_isa
def test_nan_and_inf_activations_and_weights(isa):
    """They reach the tokens and rows they belong to."""
    for tokens in (1, 2, 4, 7, 16, 20):
        for value in (math.nan, math.inf):
            codes, scale = random_fp8((70, 200))
            x = torch.randn(tokens, 200).bfloat16()
            x[tokens // 2, 130] = value
            weight = torch.randn(70, 200).bfloat16()
            with use_backend(isa):
                for y, w in (
                    (block_fp8.linear(x, codes, scale), exact(codes, scale)),
                    (linear_cpu.linear(x, weight, None), weight.double()),
                ):
                    assert torch.equal(y.isfinite(), (x.double() @ w.T).isfinite())
                weight[5, 199] = value
                x[tokens // 2, 130] = 1
                y = linear_cpu.linear(x, weight, None)
                assert torch.equal(y.isfinite(), (x.double() @ weight.double().T).isfinite())


@every_isa
@pytest.mark.parametrize("magnitude", [1e-18, 1e-9, 1e9, 1e15])
def test_linear_magnitudes(magnitude, isa):
    """Activations and scales far from one: in the vector kernels, half of E4M3's exponent is lent to either."""
    codes, scale = random_fp8((40, 300))
    for x_magnitude, scale_magnitude in ((magnitude, 1), (1, magnitude), (1 / magnitude, magnitude)):
        for tokens in (1, 2, 4, 20):
            x, s = torch.randn(tokens, 300) * x_magnitude, scale * scale_magnitude
            with use_backend(isa):
                assert_linear(block_fp8.linear(x, codes, s), x, exact(codes, s))


@every_isa
def test_subnormal_codes(isa):
    """Weights all of whose codes are E4M3's subnormals."""
    codes = torch.randint(0, 8, (40, 300), dtype=torch.uint8).view(FP8)
    scale = torch.rand(1, 3) + 0.5
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 2, 4, 20):
            x = torch.randn(tokens, 300).to(dtype)
            with use_backend(isa):
                assert_linear(block_fp8.linear(x, codes, scale), x, exact(codes, scale))


@every_isa
@ACTIVATIONS
def test_inputs_as_they_come(dtype, isa):
    """Strided activations, leading dimensions, none or no tokens, scales that are no fp32, weights at odd addresses."""
    codes, scale = random_fp8((50, 200))
    weight = exact(codes, scale)
    x = torch.randn(200, 6).to(dtype).T
    with use_backend(isa):
        assert_linear(block_fp8.linear(x, codes, scale), x, weight)
        assert same_bits(
            block_fp8.linear(x.view(2, 3, 200), codes, scale).view(6, 50), block_fp8.linear(x, codes, scale)
        )
        assert same_bits(block_fp8.linear(x[0], codes, scale), block_fp8.linear(x[:1], codes, scale)[0])
        assert block_fp8.linear(x[:0], codes, scale).shape == (0, 50)
        rounded = scale.bfloat16()
        assert_linear(block_fp8.linear(x, codes, rounded), x, exact(codes, rounded.float()))
        strided = torch.stack((scale, scale), -1)[..., 0]
        assert same_bits(block_fp8.linear(x, codes, strided), block_fp8.linear(x, codes, scale))
        buffer = torch.zeros(1 + codes.numel(), dtype=torch.uint8)
        odd = buffer[1:].copy_(codes.view(torch.uint8).flatten()).view(FP8).view(codes.shape)
        assert odd.data_ptr() % 2
        for tokens in (1, 2, 6):
            assert same_bits(block_fp8.linear(x[:tokens], odd, scale), block_fp8.linear(x[:tokens], codes, scale))


def test_linear_chooses():
    """The public function runs the engine where that is faster or saves a copy, and gives the same results elsewhere."""
    weight = torch.randn(40, 200).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 8, 9, 40):
            x = torch.randn(tokens, 200).to(dtype)
            for backend in ("auto", "cpu", "reference"):
                with use_backend(backend):
                    y = linear.linear(x, weight)
                    assert y.dtype == dtype
                    assert distance(y, x.double() @ weight.double().T) <= (4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(("capability", "slow"), [("DEFAULT", False), ("AVX2", True), ("AVX512", False)])
def test_who_multiplies_many_tokens(monkeypatch, capability, slow):
    """torch's bf16 product takes several times as long without AVX-512; with it, the engine leaves many tokens to torch."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    x, weight = torch.randn(9, 200).bfloat16(), torch.randn(40, 200).bfloat16()
    assert linear_cpu.unsupported_reason(x[:8], weight, None) is None
    assert (linear_cpu.unsupported_reason(x, weight, None) is None) == slow


# To and from FP8: every bit is the reference's.

CONVERSIONS = [(1, 1), (3, 7), (17, 33), (127, 129), (128, 128), (129, 127), (200, 391), (576, 200), (130, 1)]


def by_reference(function, *args):
    with use_backend("reference"):
        return function(*args)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dequantize(dtype, isa):
    every_code = torch.arange(256, dtype=torch.uint8).repeat(130, 2).view(FP8)
    cases = [random_fp8(shape) for shape in CONVERSIONS] + [
        (every_code, torch.rand(2, 4) * magnitude) for magnitude in (1, 1e-38, 1e-42, 1e-7, 1e36)
    ]
    for codes, scale in cases:
        wanted = by_reference(block_fp8.dequantize, codes, scale, dtype)
        with use_backend(isa):
            found = block_fp8.dequantize(codes, scale, dtype)
        nan = wanted.isnan()
        assert torch.equal(found.isnan(), nan)  # whose sign and payload no one promises
        assert same_bits(found.masked_fill(nan, 0), wanted.masked_fill(nan, 0))


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantize(dtype, isa):
    cases = [(torch.randn(shape) * torch.rand(shape).pow(6)).to(dtype) for shape in CONVERSIONS]
    # all bf16, or as many fp16, patterns that are finite; then the ends of fp32
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    every = patterns.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    cases += [every.where(every.isfinite(), 0), torch.zeros(140, 200, dtype=dtype), torch.full((2, 2), -0.0).to(dtype)]
    if dtype != torch.float16:
        cases += [(torch.randn(130, 130).clamp(-1, 1) * m).to(dtype) for m in (1e-45, 1e-42, 1e-38, 1e-30, 3.3e38)]
    # ties between two codes
    cases += [torch.arange(-448, 449, 1, dtype=torch.float32).repeat(3, 1).to(dtype)]
    cases += [torch.cat((torch.arange(0, 33) * 2.0**-10, torch.tensor([448.0]))).repeat(3, 1).to(dtype)]
    for weight in cases:
        wanted, wanted_scale = by_reference(block_fp8.quantize, weight)
        with use_backend(isa):
            codes, scale = block_fp8.quantize(weight)
            assert same_bits(scale, wanted_scale)
            assert same_bits(codes, wanted)
            assert same_bits(block_fp8.scales(weight), wanted_scale)
            if weight.shape[0] != weight.shape[1]:
                assert same_bits(block_fp8.quantize(weight.T)[0], by_reference(block_fp8.quantize, weight.T)[0])


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantize_refuses_as_the_reference_does(dtype, isa):
    for value in (math.nan, math.inf, -math.inf):
        for where in ((0, 0), (64, 3), (129, 130), (129, 0)):
            weight = torch.randn(130, 131).to(dtype)
            weight[where] = value
            messages = []
            for backend in ("reference", isa):
                with use_backend(backend), pytest.raises(ValueError) as error:
                    block_fp8.quantize(weight)
                messages.append(str(error.value))
            assert messages[0] == messages[1]


# What C code gets wrong: bytes beyond the ends.


@every_isa
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_reads_nothing_beyond_its_tensors(at_end, isa):
    """Everything lies against memory that must not be touched. A crash of this test is its failure."""
    with use_backend(isa):
        for rows, columns in (
            (1, 1),
            (3, 5),
            (17, 63),
            (33, 65),
            (16, 129),
            (65, 191),
            (4, 255),
            (130, 131),
            (20, 2177),
        ):
            codes, scale = (guarded(part, at_end) for part in random_fp8((rows, columns)))
            weight = guarded(torch.randn(rows, columns).bfloat16(), at_end)
            bias = guarded(torch.randn(rows), at_end)
            for dtype in _native.ACTIVATIONS:
                for tokens in (1, 2, 3, 4, 7, 12, 16, 17):
                    x = guarded(torch.randn(tokens, columns).to(dtype), at_end)
                    assert_linear(block_fp8.linear(x, codes, scale, bias), x, exact(codes, scale), bias)
                    assert_linear(linear_cpu.linear(x, weight, bias), x, weight.double(), bias)
                    rms_norm.rms_norm(x, guarded(torch.ones(columns).to(dtype), at_end), 1e-6)
                block_fp8.dequantize(codes, scale, dtype)
                block_fp8.quantize(guarded(weight.to(dtype), at_end))


def test_instruction_set_that_this_cpu_lacks():
    codes, scale = random_fp8((3, 3))
    with use_backend("cpu:avx1024"), pytest.raises(BackendError, match=f"avx1024; this one has {INSTRUCTION_SETS[0]}"):
        block_fp8.linear(torch.randn(1, 3), codes, scale)
