"""The CPU engine's kernels for four-bit codes, on every instruction set, next to fp64 products of the dequantised weight."""

import ctypes
from functools import partial

import pytest
import torch
from engine_cases import BACKENDS, distance, every_isa, needs_engine, random_fp8
from releases import same_bits

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops import block_fp8, four_bit
from modeling_deepseek_moe.ops._structs import FOUR_BIT, NESTED, Nested
from modeling_deepseek_moe.ops.experts import cpu as experts_cpu
from modeling_deepseek_moe.ops.experts.reference import run_experts
from modeling_deepseek_moe.ops.four_bit import cpu
from modeling_deepseek_moe.ops.four_bit.product import linear
from modeling_deepseek_moe.ops.linear import cpu as linear_cpu

pytestmark = needs_engine
every_kind = pytest.mark.parametrize("kind", FOUR_BIT)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 4, 5, 12, 16, 40)
FEW = 12  # tokens for which no kernel rounds weights
# what rounding costs: of the result; and with bf16 activations, of the weights for some of the kernels
BOUNDS = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}
SUMS = 5e-4  # of few bf16 activations, before the result is rounded


def split(kind: str) -> tuple[str, int]:
    name = kind.removesuffix(NESTED)
    return name, four_bit.KINDS[name].group


def quantised(kind: str, rows: int, columns: int, seed: int = 0):
    """Codes, scales and the weight in fp64: rows of different sizes, all codes among them."""
    name, group = split(kind)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-0.5, 0, rows)[:, None]
    codes, scales = four_bit.encode(weight, (1, group), kind=name)
    codes.view(torch.uint8).view(-1)[:16] = torch.arange(16, dtype=torch.uint8) * 17
    if kind.endswith(NESTED):
        scales = four_bit.nest(scales)
    return codes, scales, four_bit.decode(codes, scales, torch.float32, (1, group), kind=name).double()


@every_isa
@every_kind
@pytest.mark.parametrize("rows, groups", [(1, 1), (37, 3), (130, 9), (96, 34)])
def test_linear(isa, kind, rows, groups):
    name, group = split(kind)
    codes, scales, exact = quantised(kind, rows, groups * group)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        for tokens in TOKENS:
            x = torch.randn(tokens, groups * group, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            with use_backend(isa):
                found = cpu.linear(x, codes, cpu.parts_of(scales), bias, name)
            wanted = x.double() @ exact.T + bias.double()
            assert found.dtype == dtype
            # one row alone may cancel: it is held against what it is a sum of
            size = wanted if rows > 1 else x.double().abs() @ exact.abs().T + bias.double().abs()
            error = (found.double() - wanted).norm()
            assert error < BOUNDS[dtype] * size.norm()
            if dtype == torch.bfloat16 and tokens <= FEW:
                assert error < (wanted.to(dtype).double() - wanted).norm() + SUMS * size.norm()


@every_isa
@every_kind
def test_what_a_token_gets_depends_on_no_other(isa, kind):
    name, group = split(kind)
    codes, scales, _ = quantised(kind, 40, 5 * group)
    x = torch.randn(24, 5 * group).bfloat16()
    with use_backend(isa):
        whole = cpu.linear(x, codes, cpu.parts_of(scales), None, name)
        other = torch.cat((x[:12], torch.randn(12, 5 * group).bfloat16()))
        assert torch.equal(cpu.linear(other, codes, cpu.parts_of(scales), None, name)[:12], whole[:12])


@every_isa
@pytest.mark.parametrize("kind", ["fp8", "bf16", *FOUR_BIT])
def test_three_and_four_tokens_get_the_bits_that_more_get(isa, kind):
    """A draft's verification computes what a longer pass would: kernels of their own, the same sums.

    But for bf16 weights on AMX, where five tokens are tiles, whose sums are in another order.
    """
    for rows, groups in ((1, 1), (37, 3), (130, 9), (64, 34)):
        name, group = split(kind) if kind in FOUR_BIT else (kind, 64)
        x = torch.randn(4 if (kind, isa) == ("bf16", "cpu:amx") else 5, groups * group).bfloat16()
        if kind in FOUR_BIT:
            codes, scales, _ = quantised(kind, rows, groups * group)
            multiply = partial(cpu.linear, codes=codes, scales=cpu.parts_of(scales), bias=None, kind=name)
        elif kind == "fp8":
            codes, scale = random_fp8((rows, groups * group))
            multiply = partial(block_fp8.linear, weight=codes, scale_inv=scale)
        else:
            multiply = partial(linear_cpu.linear, weight=torch.randn(rows, groups * group).bfloat16(), bias=None)
        with use_backend(isa):
            more = multiply(x)
            assert same_bits(multiply(x[:3]), more[:3]) and same_bits(multiply(x[:4]), more[:4])


@pytest.mark.skipif(not {"cpu:avx512", "cpu:avx512_bf16"} <= set(BACKENDS), reason="a CPU without AVX-512 BF16")
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_few_bf16_tokens_meet_the_same_integers_with_avx512_as_with_its_bf16(kind):
    name, group = split(kind)
    codes, scales, _ = quantised(kind, 130, 9 * group)
    for tokens in (1, 2, 7, 15):
        x = torch.randn(tokens, 9 * group).bfloat16()
        found = []
        for isa in ("cpu:avx512", "cpu:avx512_bf16"):
            with use_backend(isa):
                found.append(cpu.linear(x, codes, cpu.parts_of(scales), None, name))
        assert same_bits(*found)


@pytest.mark.parametrize("isa", [isa for isa in BACKENDS if isa in ("cpu:baseline", "cpu:avx2", "cpu:avx512")])
def test_fp8_bits_of_a_token_do_not_depend_on_how_many_few_there_are(isa):
    """One sum for each row and token, in one order, whether one, two or four tokens share what is decoded."""
    for rows, columns in ((1, 64), (3, 200), (37, 192), (130, 576), (256, 2176)):
        codes, scale = random_fp8((rows, columns))
        x = torch.randn(15, columns)
        with use_backend(isa):
            whole = block_fp8.linear(x, codes, scale)
            for tokens in (1, 2, 3, 4, 6, 7):
                assert same_bits(block_fp8.linear(x[:tokens], codes, scale), whole[:tokens])


@every_isa
def test_outliers_among_activations(isa):
    """Activations a thousand times larger than the others of their group leave those with theirs."""
    codes, scales, exact = quantised("nf4", 64, 512)
    x = torch.randn(1, 512)
    x[:, 100] = 1000.0
    x = x.bfloat16()
    with use_backend(isa):
        found = cpu.linear(x, codes, [scales], None, "nf4")
    assert distance(found, x.double() @ exact.T) < BOUNDS[torch.bfloat16]
    small = x.clone()
    small[:, 100] = 0
    with use_backend(isa):
        found = cpu.linear(small, codes, [scales], None, "nf4")
    assert distance(found, small.double() @ exact.T) < BOUNDS[torch.bfloat16]


@every_isa
@every_kind
def test_numbers_that_are_not_finite_are_seen(isa, kind):
    name, group = split(kind)
    codes, scales, _ = quantised(kind, 3, 2 * group)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 4, 20):
            x = torch.ones(tokens, 2 * group, dtype=dtype)
            x[0, 5] = torch.nan
            with use_backend(isa):
                found = cpu.linear(x, codes, cpu.parts_of(scales), None, name)
            assert found[0].isnan().all() and found[1:].isfinite().all()
            assert (cpu.linear(x * 0, codes, cpu.parts_of(scales), None, name)[1:] == 0).all()


@every_isa
def test_ends_of_powers_of_two(isa):
    codes, scales, _ = quantised("mxfp4", 4, 64)
    scales.view(torch.uint8)[:, :] = torch.tensor([[0, 1], [250, 10], [255, 127], [127, 127]], dtype=torch.uint8)
    exact = four_bit.decode(codes, scales, torch.float32, (1, 32), kind="mxfp4")
    for dtype, tokens in ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 20)):
        x = torch.full((tokens, 64), 2.0**-8, dtype=dtype)
        with use_backend(isa):
            found = cpu.linear(x, codes, [scales], None, "mxfp4")
        wanted = x.double() @ exact.double().T
        assert found[:, 2].isnan().all() and found[:, [0, 1, 3]].isfinite().all()
        assert torch.allclose(found[:, [1, 3]].double(), wanted[:, [1, 3]], rtol=2e-2)
        assert torch.allclose(found[:, 0].double(), wanted[:, 0], atol=1e-36)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(kind, dtype):
    name, _ = split(kind)
    codes, scales, exact = quantised(kind, 70, 192)
    found = cpu.dequantize(codes, cpu.parts_of(scales), dtype, name)
    assert found.dtype == dtype and torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def expert_table(kind: str, experts: int, hidden: int, width: int):
    """Addresses ``[E, 3, 2]``, what they lead to, and the matrices in fp64."""
    table, kept, exact = torch.zeros(experts, 3, 2, dtype=torch.int64), [], []
    for expert in range(experts):
        for part, shape in enumerate([(width, hidden), (width, hidden), (hidden, width)]):
            codes, scales, weight = quantised(kind, *shape, seed=3 * expert + part)
            record = Nested.of(scales) if kind.endswith(NESTED) else None
            table[expert, part, 0] = codes.data_ptr()
            table[expert, part, 1] = scales.data_ptr() if record is None else ctypes.addressof(record)
            kept.append((codes, scales, record))
            exact.append(weight)
    return table, kept, exact


@every_isa
@every_kind
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_experts(isa, kind, dtype):
    _, group = split(kind)
    experts, hidden, width = 5, 3 * group, 2 * group if group == 64 else 96
    table, kept, exact = expert_table(kind, experts, hidden, width)

    def expert(index, x):
        gate, up, down = exact[3 * index : 3 * index + 3]
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    for tokens in (1, 3, 60):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        indices = torch.rand(tokens, experts, generator=generator).topk(2).indices
        weights = torch.rand(tokens, 2, generator=generator)
        with use_backend(isa):
            found = experts_cpu.routed(x, indices, weights, table, width, torch.uint8, kind)
        wanted = run_experts(x.double(), indices, weights.double(), expert, experts)
        assert distance(found, wanted) < (3e-6 if dtype == torch.float32 else 1e-2)
    del kept


@pytest.mark.parametrize("requires_grad", [False, True])
@every_kind
def test_products_and_gradients_are_the_reference_s(kind, requires_grad):
    name, group = split(kind)
    codes, scales, exact = quantised(kind, 24, 3 * group)
    x = torch.randn(6, 3 * group, requires_grad=requires_grad)
    found = linear(x, codes, scales, None, (1, group), kind=name)
    with use_backend("reference"):
        wanted = linear(x, codes, scales, None, (1, group), kind=name)
    assert distance(found.detach(), wanted.detach()) < 1e-6
    if requires_grad:
        found.square().sum().backward()
        assert distance(x.grad, 2 * wanted.detach().double() @ exact) < 1e-5


def test_bad_input_is_refused():
    codes, scales, _ = quantised("int4", 8, 64)
    x = torch.randn(2, 64)
    for arguments, message in (
        ((x, codes, [scales[:, :1]], None, "int4"), "scale for each group of 32"),
        ((x, codes, [scales.float()], None, "int4"), "scale for each group"),
        ((x[:, :32], codes, [scales], None, "int4"), "wanted .*64"),
        ((x, codes, [scales], torch.zeros(3), "int4"), "found a bias"),
        ((x, codes, [scales], None, "int3"), "found int3"),
        ((x.double(), codes, [scales], None, "int4"), "found activations"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.linear(*arguments)
    with pytest.raises(ValueError, match="features"):
        linear(x[:, :32], codes, scales, None, (1, 32), kind="int4")
    table = torch.zeros(1, 3, 2, dtype=torch.int64)
    indices, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match="whole groups"):
        experts_cpu.routed(x, indices, weights, table, 40, torch.uint8, "int4")
    with pytest.raises(ValueError, match="int3"):
        experts_cpu.routed(x, indices, weights, table, 32, torch.uint8, "int3")


def test_other_groups_are_left_to_the_reference():
    codes, scales = four_bit.encode(torch.randn(8, 128), (1, 64), kind="int4")
    assert "groups of 32" in cpu.unsupported_codes("int4", codes, scales, (1, 64))
    x = torch.randn(2, 128)
    wanted = x @ four_bit.decode(codes, scales, torch.float32, (1, 64), kind="int4").T
    assert distance(linear(x, codes, scales, None, (1, 64), kind="int4"), wanted) < 1e-6


@every_isa
@every_kind
def test_absorbed_attention_reads_the_codes(isa, kind):
    """W_UK and W_UV as four-bit rows, in the engine's own attention of one token."""
    from modeling_deepseek_moe.ops.absorbed_attention import cpu as attention
    from modeling_deepseek_moe.ops.absorbed_attention import reference

    name, group = split(kind)
    heads, nope, value, rope, rank, length = 3, 24, 40, 16, 2 * group, 70
    codes, scales, exact = quantised(kind, heads * (nope + value), rank)
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, 1, nope), (2, heads, 1, rope), (2, 1, length, rank), (2, 1, length, rope)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        with use_backend(isa):
            found = attention.decode_four_bit(*tensors, None, codes, cpu.parts_of(scales), name, 0.1)
        w_uk, w_uv = exact.view(heads, -1, rank).tensor_split((nope,), dim=1)
        wanted, _ = reference.absorbed_attention(*(t.double() for t in tensors), None, w_uk, w_uv, 0.1)
        assert distance(found, wanted) < bound
