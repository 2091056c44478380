"""RMSNorm on the CPU engine; the processor's modes; inputs that do not fit."""

import math

import pytest
import torch
from engine_calls import differing, every_call, run
from engine_cases import FP8, Experts, every_isa, needs_engine, random_fp8

from modeling_deepseek_moe import BackendError, use_backend
from modeling_deepseek_moe.ops import _native, block_fp8, linear, rms_norm
from modeling_deepseek_moe.ops.block_fp8 import cpu as fp8_cpu
from modeling_deepseek_moe.ops.experts import cpu as experts_cpu
from modeling_deepseek_moe.ops.linear import cpu as bf16_cpu
from modeling_deepseek_moe.ops.rms_norm import cpu as norm_cpu

pytestmark = needs_engine

# RMSNorm, which is the engine's in every dtype.


@every_isa
@pytest.mark.parametrize("dtype", _native.ACTIVATIONS, ids=str)
def test_rms_norm(dtype, isa):
    """Against fp64, within what fp32 sums and the dtype's two roundings leave.

    The sum of n squares is off by at most n·2⁻²⁴ of itself (far less: lanes add up pairwise), of which the root halves
    the effect; the quotient, the root and the product add 2⁻²⁴ each. Every rounding to the dtype adds eps / 2.
    """
    eps = torch.finfo(dtype).eps
    for n in (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 100, 129, 576, 2048, 7168):
        for magnitude in (1.0, 1e-2, 100.0):
            for tokens in (1, 3):
                x, w = (torch.randn(tokens, n) * magnitude).to(dtype), torch.randn(n).to(dtype)
                wanted = w.double() * x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
                with use_backend(isa):
                    found = norm_cpu.rms_norm(x, w, 1e-6)
                assert found.dtype == dtype
                bound = (
                    wanted.abs() * (eps * 1.01 + (n / 2 + 4) * 2.0**-24) + 4 * torch.finfo(dtype).smallest_normal * eps
                )
                assert ((found.double() - wanted).abs() <= bound).all(), (n, magnitude)


@every_isa
@pytest.mark.parametrize("dtype", _native.ACTIVATIONS, ids=str)
def test_rms_norm_rounds_where_the_reference_does(dtype, isa):
    """Before the product with the weight, and after it."""
    x, w = torch.randn(20, 300).to(dtype), torch.randn(300).to(dtype)
    with use_backend("reference"):
        wanted = rms_norm.rms_norm(x, w, 1e-6)
    with use_backend(isa):
        found = rms_norm.rms_norm(x, w, 1e-6)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    apart = (found.view(bits).long() - wanted.view(bits).long()).abs()
    # a factor that is one ulp of fp32 apart moves few values of a shorter dtype over a rounding's edge
    assert apart.max() <= (8 if dtype == torch.float32 else 2)
    assert dtype == torch.float32 or (apart > 0).double().mean() < 0.01


@every_isa
def test_rms_norm_of_what_is_not_finite_or_zero(isa):
    x = torch.randn(5, 40)
    x[1, 3], x[2, 39], x[3] = math.nan, math.inf, 0.0
    with use_backend("reference"):
        wanted = rms_norm.rms_norm(x, torch.ones(40), 1e-6)
    with use_backend(isa):
        found = rms_norm.rms_norm(x, torch.ones(40), 1e-6)
    torch.testing.assert_close(found, wanted, equal_nan=True)


# Denormals.


@pytest.fixture
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


def denormals_are_flushed() -> bool:
    return not (torch.tensor([2.0**-130]) * torch.tensor([0.5])).any()


# Products that are denormals, and inputs that are; the rest of the range by `make slow`.
MAGNITUDES = [1e-37, 1e-40, *(pytest.param(size, marks=pytest.mark.slow) for size in (1.0, 1e-18, 1e-44))]


@pytest.fixture(scope="module", params=MAGNITUDES)
def calls(request):
    kept = []
    yield [every_call(tokens, 150, 300, request.param, kept) for tokens in (1, 3, 20)]
    kept.clear()


@every_isa
def test_flushed_denormals_change_no_bit(calls, isa, flushing):
    """Of codes, scales, activations or results; and the mode is the caller's again afterwards."""
    torch.set_flush_denormal(False)
    torch.set_num_threads(2)  # the caller's own and one of the pool
    with use_backend(isa):
        wanted = [run(call) for call in calls]
        torch.set_flush_denormal(True)
        found = [run(call) for call in calls]
        assert denormals_are_flushed()
        torch.set_flush_denormal(False)
        for f, w in zip(found, wanted, strict=True):
            assert not differing(f, w)
        assert not denormals_are_flushed()


# What does not fit is refused, by the public functions and by the operators under them.

CODES, SCALE = random_fp8((200, 130))
WEIGHT = torch.randn(200, 130).bfloat16()
X = torch.randn(3, 130)
META = torch.device("meta")
REFUSED = {
    "linear-short-activations": lambda: block_fp8.linear(X[:, 1:], CODES, SCALE),
    "linear-scalar": lambda: block_fp8.linear(X[0, 0], CODES, SCALE),
    "linear-fp64": lambda: block_fp8.linear(X.double(), CODES, SCALE),
    "linear-int": lambda: block_fp8.linear(X.int(), CODES, SCALE),
    "linear-e5m2": lambda: block_fp8.linear(X, CODES.view(torch.float8_e5m2), SCALE),
    "linear-stack": lambda: block_fp8.linear(X, CODES[None], SCALE[None]),
    "linear-few-scales": lambda: block_fp8.linear(X, CODES, SCALE[:1]),
    "linear-flat-scales": lambda: block_fp8.linear(X, CODES, SCALE.flatten()),
    "linear-short-bias": lambda: block_fp8.linear(X, CODES, SCALE, torch.ones(199)),
    "linear-matrix-bias": lambda: block_fp8.linear(X, CODES, SCALE, torch.ones(1, 200)),
    "linear-transposed": lambda: block_fp8.linear(X, CODES.T.contiguous().T, SCALE),
    "linear-blocks": lambda: block_fp8.linear(X[:, :64], CODES[:64, :64].contiguous(), SCALE[:1, :1], None, (64, 64)),
    "linear-meta-scales": lambda: block_fp8.linear(X, CODES, SCALE.to(META)),
    "linear-meta-bias": lambda: block_fp8.linear(X, CODES, SCALE, torch.ones(200, device=META)),
    "linear-meta": lambda: block_fp8.linear(X.to(META), CODES.to(META), SCALE.to(META)),
    "dequantize-fp64": lambda: block_fp8.dequantize(CODES, SCALE, torch.float64),
    "dequantize-transposed": lambda: block_fp8.dequantize(CODES.T, SCALE.T, torch.float32),
    "dequantize-short-scales": lambda: block_fp8.dequantize(CODES, SCALE[:, :1], torch.float32),
    "quantize-fp64": lambda: block_fp8.quantize(X.double()),
    "quantize-vector": lambda: block_fp8.quantize(X[0]),
    "quantize-meta": lambda: block_fp8.quantize(X.to(META)),
    "scales-blocks": lambda: block_fp8.scales(X, (64, 64)),
    "op-fp8-linear-activations": lambda: fp8_cpu.linear(X[:, :129], CODES, SCALE, None),
    "op-fp8-linear-int": lambda: fp8_cpu.linear(X.int(), CODES, SCALE, None),
    "op-fp8-linear-weight": lambda: fp8_cpu.linear(X, WEIGHT, SCALE, None),
    "op-fp8-linear-scales": lambda: fp8_cpu.linear(X, CODES, SCALE[:1], None),
    "op-fp8-linear-bias": lambda: fp8_cpu.linear(X, CODES, SCALE, torch.ones(1)),
    "op-bf16-linear-activations": lambda: bf16_cpu.linear(X[:, :129], WEIGHT, None),
    "op-bf16-linear-scalar": lambda: bf16_cpu.linear(X[0, 0], WEIGHT, None),
    "op-bf16-linear-weight": lambda: bf16_cpu.linear(X, WEIGHT.float(), None),
    "op-bf16-linear-vector": lambda: bf16_cpu.linear(X, WEIGHT[0], None),
    "op-bf16-linear-bias": lambda: bf16_cpu.linear(X, WEIGHT, torch.ones(201)),
    "op-dequantize-weight": lambda: fp8_cpu.dequantize(WEIGHT, SCALE, torch.float32),
    "op-dequantize-scales": lambda: fp8_cpu.dequantize(CODES, SCALE[:, :1], torch.float32),
    "op-dequantize-dtype": lambda: fp8_cpu.dequantize(CODES, SCALE, torch.int32),
    "op-quantize-vector": lambda: fp8_cpu.quantize(X[0], True, False),
    "op-quantize-dtype": lambda: fp8_cpu.quantize(X.int(), False, False),
    "op-rms-norm-short-weight": lambda: norm_cpu.rms_norm(X, torch.ones(129), 1e-6),
    "op-rms-norm-one-weight": lambda: norm_cpu.rms_norm(X, torch.ones(1), 1e-6),
    "op-rms-norm-dtype": lambda: norm_cpu.rms_norm(X, torch.ones(130).bfloat16(), 1e-6),
    "op-rms-norm-fp64": lambda: norm_cpu.rms_norm(X.double(), torch.ones(130).double(), 1e-6),
    "op-rms-norm-scalar": lambda: norm_cpu.rms_norm(X[0, 0], torch.ones(()), 1e-6),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(call):
    """With both the value found and the value wanted, or what the backend has."""
    with (
        use_backend("cpu"),
        pytest.raises((BackendError, ValueError), match=r"wanted|wants|must|needs|takes|has|quantises"),
    ):
        call()


INDICES, GATES = torch.zeros((3, 2), dtype=torch.int64), torch.ones(3, 2)


def experts_call(kind, **changes):
    """A call of `experts.cpu.stacked` and of `routed` in which some arguments are exchanged."""
    home = Experts.random(kind, 2, 130, 70)
    arguments = {"x": X, "indices": INDICES, "weights": GATES, "gate_up": home.gate_up, "down": home.down}
    arguments |= dict(zip(("gate_up_scale", "down_scale"), home.stacked_scales, strict=True))
    change = {name: make(arguments[name]) for name, make in changes.items()}
    return experts_cpu.stacked, tuple((arguments | change).values())


EXPERTS_REFUSED = {
    "long-activations": {"x": lambda x: torch.randn(3, 131)},
    "vector": {"x": lambda x: x[0]},
    "fp64": {"x": lambda x: x.double()},
    "more-tokens": {"x": lambda x: torch.randn(4, 130)},
    "int32-indices": {"indices": lambda i: i.int()},
    "float-indices": {"indices": lambda i: i.float()},
    "flat-indices": {"indices": lambda i: i.flatten()},
    "fewer-weights": {"weights": lambda w: w[:, :1]},
    "odd-gate-up": {"gate_up": lambda w: w[:, 1:]},
    "wide-gate-up": {"gate_up": lambda w: w[:, :, :129]},
    "fewer-experts": {"gate_up": lambda w: w[:1]},
    "another-width": {"down": lambda w: w[..., :69]},
    "fewer-rows": {"down": lambda w: w[:, :100]},
    "fp32-weights": {"gate_up": lambda w: w.float(), "down": lambda w: w.float()},
    "two-dtypes": {"down": lambda w: w.float().half()},
}
FP8_EXPERTS_REFUSED = {
    "no-scales": {"gate_up_scale": lambda s: None},
    "one-scale": {"down_scale": lambda s: s[:, :1]},
    "scales-of-one-piece": {"gate_up_scale": lambda s: s[:, :1]},
}


@pytest.mark.parametrize("change", EXPERTS_REFUSED.values(), ids=EXPERTS_REFUSED)
@pytest.mark.parametrize("kind", [FP8, torch.bfloat16], ids=["fp8", "bf16"])
def test_experts_that_do_not_fit_are_refused(kind, change):
    function, arguments = experts_call(kind, **change)
    with pytest.raises(ValueError, match=r"experts: found .*wanted "):
        function(*arguments)


@pytest.mark.parametrize("change", FP8_EXPERTS_REFUSED.values(), ids=FP8_EXPERTS_REFUSED)
def test_scales_of_experts_that_do_not_fit_are_refused(change):
    function, arguments = experts_call(FP8, **change)
    with pytest.raises(ValueError, match=r"experts: found scales .*wanted "):
        function(*arguments)


def test_experts_in_other_places_that_do_not_fit_are_refused():
    home = Experts.random(FP8, 2, 130, 70)
    table = home.addresses()
    for addresses in (table[..., 0], table.int(), table.view(2, 2, 3), table[0]):
        with pytest.raises(ValueError, match=r"found addresses .*wanted \[E, 3, 2\]"):
            experts_cpu.routed(X, INDICES, GATES, addresses, 70, FP8)
    for out in (torch.zeros(3, 130).bfloat16(), torch.zeros(2, 130), torch.zeros(130, 3).T):
        with pytest.raises(ValueError, match="found an output"):
            experts_cpu.accumulate(out, X, INDICES, GATES, table, 70, FP8)
    gate, up, down = (matrix for matrix, _ in home.matrices(0))
    gate_scale, up_scale, down_scale = (scale for _, scale in home.matrices(0))
    for arguments in (
        (gate, up[:69], down, gate_scale, up_scale, down_scale),
        (gate, up, down[:, :69], gate_scale, up_scale, down_scale),
        (gate, up.float().bfloat16(), down, gate_scale, up_scale, down_scale),
        (gate[0], up, down, gate_scale, up_scale, down_scale),
        (gate, up, down, None, up_scale, down_scale),
        (gate, up, down, gate_scale, up_scale, down_scale[:1]),
    ):
        with pytest.raises(ValueError, match=r"experts: found .*wanted "):
            experts_cpu.swiglu(X, *arguments)


def test_what_torch_can_do_is_left_to_it():
    """Layers that need no engine run in plain torch where it refuses: integers aside, they have a definition there."""
    with use_backend("cpu"):
        assert linear.linear(X.double(), WEIGHT.double()).dtype == torch.float64
        torch.testing.assert_close(linear.linear(X, WEIGHT.T.contiguous().T), X @ WEIGHT.float().T)
        assert rms_norm.rms_norm(X, torch.full((1,), 2.0), 1e-6).shape == X.shape
        assert linear.linear(X.to(META), WEIGHT.to(META)).is_meta
        with pytest.raises(ValueError, match=r"\[3, 129\] in torch.bfloat16, wanted \[..., 130\]"):
            linear.linear(X[:, :129].bfloat16(), WEIGHT)


@every_isa
def test_nothing_to_multiply(isa):
    """No columns: the bias is all there is. No rows, no tokens: nothing."""
    for dtype in _native.ACTIVATIONS:
        for tokens in (0, 1, 3, 20):
            bias = torch.randn(70).to(dtype)
            x, codes, scale = torch.randn(tokens, 0).to(dtype), torch.empty(70, 0).to(FP8), torch.ones(1, 0)
            with use_backend(isa):
                assert torch.equal(fp8_cpu.linear(x, codes, scale, bias), bias.expand(tokens, 70))
                assert torch.equal(bf16_cpu.linear(x, codes.bfloat16(), None), torch.zeros(tokens, 70, dtype=dtype))
                assert fp8_cpu.linear(x, codes[:0], scale[:0], None).shape == (tokens, 0)
                assert norm_cpu.rms_norm(x, torch.ones(0).to(dtype), 1e-6).shape == (tokens, 0)
            for backend in (isa, "reference"):
                with use_backend(backend):
                    assert torch.equal(block_fp8.linear(x, codes, scale, bias), bias.expand(tokens, 70))
                    assert block_fp8.dequantize(codes, scale, dtype).shape == (70, 0)
                    assert [part.shape for part in block_fp8.quantize(x)] == [(tokens, 0), (-(-tokens // 128), 0)]
