"""Routed experts that train in FP8, all at once in the interpreter, next to their definition, expert by expert, and to fp64."""

import pytest
import torch
from gpu.errors import poisoned, relative

from modeling_deepseek_moe.ops import _triton, block_fp8
from modeling_deepseek_moe.ops.experts import triton_fp8
from modeling_deepseek_moe.ops.experts.reference import Slots
from modeling_deepseek_moe.ops.experts.trained import RoutedSwiGlu
from modeling_deepseek_moe.ops.experts.triton_products import Order
from modeling_deepseek_moe.training.fp8_functions import Fp8SwiGluFunction, Fp8Weight

E, K, D, I = 4, 2, 136, 72  # noqa: E741
NAMES = ("y", "x", "weights", "gate_up", "down")


@pytest.fixture(params=[80, 90])
def generation(request, monkeypatch):
    """Cards that read codes as bf16, and that multiply them."""
    monkeypatch.setattr(_triton, "OLDEST", request.param)
    monkeypatch.setattr(_triton, "capability", lambda device: request.param)


@pytest.fixture(autouse=True)
def _casts_without_a_dispatcher(monkeypatch):
    """Whose operator for CUDA alone takes no tensors of the CPU."""
    monkeypatch.setattr(triton_fp8, "quantize_tiles", triton_fp8.quantize_tiles.cuda)


def inputs(tokens: int, dtype=torch.bfloat16, spread: float = 1.0):
    """The third expert gets no rows, the first more than a tile of many tokens; slots that another rank serves, one token's both."""
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn((tokens, D), generator=g) * spread).to(dtype)
    indices = torch.stack((torch.zeros(tokens), torch.ones(tokens)), 1).long()
    indices[1::5, 1], indices[-1], indices[2, 1] = E - 1, E, E
    weights = torch.rand((tokens, K), generator=g)
    gate_up, down = (torch.randn(shape, generator=g) * 0.1 for shape in ((E, 2 * I, D), (E, D, I)))
    return x, indices, weights, gate_up, down, torch.randn((tokens, D), generator=g).to(dtype)


def defined(x, indices, weights, gate_up, down, fp8_wgrad):
    """As `Fp8TrainedExperts` computes it without kernels."""
    slots = Slots.of(indices, E)
    order = slots.order[: sum(slots.counts)]
    tokens = order // K
    quantized = [
        (*map(Fp8Weight.of, both.chunk(2)), Fp8Weight.of(last)) for both, last in zip(gate_up, down, strict=True)
    ]
    y = Fp8SwiGluFunction.apply(x[tokens], gate_up, down, quantized, slots.counts, fp8_wgrad)
    weighted = y * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, tokens, weighted.to(x.dtype))


def grouped(x, indices, weights, gate_up, down, fp8_wgrad):
    stacks = triton_fp8.Stack.of(gate_up, 2), triton_fp8.Stack.of(down)
    return triton_fp8.GroupedFp8SwiGlu.apply(x, indices, weights, gate_up, down, stacks, fp8_wgrad)


def run(function, x, indices, weights, gate_up, down, dy, *more):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, gate_up, down)]
    y = function(leaves[0], indices, *leaves[1:], *more)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def poison(monkeypatch):
    empty = torch.empty

    def made(*arguments, **named):
        found = empty(*arguments, **named)
        if found.dtype == torch.float8_e4m3fn:
            found.view(torch.uint8).fill_(0x7F)
        return found.fill_(float("nan")) if found.is_floating_point() and found.itemsize > 1 else found

    monkeypatch.setattr(torch, "empty", made)


@pytest.mark.parametrize(
    ("generation", "tokens", "dtype", "fp8_wgrad"),
    [
        pytest.param(80, 150, torch.bfloat16, True, id="80-bf16"),
        pytest.param(80, 19, torch.float32, False, id="80-fp32-few-bf16-wgrad"),
        pytest.param(90, 19, torch.bfloat16, False, id="90-bf16-few-bf16-wgrad"),
        pytest.param(90, 150, torch.float32, True, id="90-fp32"),
    ],
    indirect=["generation"],
)
def test_as_defined(generation, tokens, dtype, fp8_wgrad, monkeypatch):
    given = inputs(tokens, dtype)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    exact = run(lambda *a: RoutedSwiGlu.apply(*a, torch.float64), *wide)
    wanted = run(defined, *given, fp8_wgrad)
    poison(monkeypatch)
    found = run(grouped, *(poisoned(t) if t.is_floating_point() else t for t in given), fp8_wgrad)
    for name, got, own, right in zip(NAMES, found, wanted, exact, strict=True):
        error, base, apart = relative(got, right), relative(own, right), relative(got, own.double())
        assert got.dtype == own.dtype and got.shape == own.shape, name
        # of the weights: by the gradient of SwiGLU, in FP8 too, and not by the slots' results, which are not kept
        assert error <= max((1.5 if name == "weights" else 1.1) * base, 0.005), (name, error, base)
        assert apart <= (1.5 * base if name == "weights" else 0.7 * base), (name, apart, base)
    assert not found[3][2].any() and not found[4][2].any()  # the expert without rows
    assert not found[1][-1].any() and not found[2][-1].any()  # the token that is served elsewhere


@pytest.mark.usefixtures("generation")
def test_weights_to_the_bit():
    """Blocks of gate and up begin with each; what is not finite is told by its scale."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn((E, 2 * I, 260), generator=g) * torch.tensor([1, 1e-20, 0, 1e20])[:, None, None]
    weight[0, 3, 5], weight[3, I + 1, 259] = float("inf"), float("nan")
    found = triton_fp8.Stack.of(poisoned(weight), 2)
    for expert in range(E):
        for half in range(2):
            codes, scale = block_fp8.quantize(weight[expert, half * I : (half + 1) * I].nan_to_num(0, 0, 0))
            mine = found.codes[expert, half * I : (half + 1) * I], found.scale[expert, half : half + 1]
            lost = ~weight[expert, half * I : (half + 1) * I].isfinite()
            for tile in range(3):
                own = slice(128 * tile, 128 * tile + 128)
                if lost[:, own].any():
                    assert mine[1][0, tile].isnan()
                else:
                    assert torch.equal(mine[1][0, tile], scale[0, tile])
                    assert torch.equal(mine[0][:, own].view(torch.uint8), codes[:, own].view(torch.uint8))


@pytest.mark.usefixtures("generation")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiles_along_rows_are_cut_in_each_expert(power_of_two, monkeypatch):
    x, indices, weights, *_ = inputs(150)
    poison(monkeypatch)
    order = Order.of(indices, E)
    codes, scale = triton_fp8._across(
        triton_fp8.Activation(x, None), order, power_of_two, by_token=True, weights=weights
    )
    monkeypatch.undo()
    tile = 0
    for expert, rows, tokens in Slots.of(indices, E).experts():
        slot_weights = weights.flatten()[Slots.of(indices, E).order[rows], None]
        wanted = block_fp8.quantize_tiles((x[tokens] * slot_weights).T, power_of_two)
        room, count = -(-len(tokens) // 128), len(tokens)
        own = codes[:, 128 * tile : 128 * (tile + room)].view(torch.uint8)
        assert torch.equal(own[:, :count], wanted[0].view(torch.uint8)), expert
        assert not own[:, count:].any()
        assert torch.equal(scale[tile : tile + room], wanted[1].T)
        tile += room


def test_what_is_lost_is_seen():
    x, *rest = inputs(19)
    x[4, 100] = float("nan")
    found = run(grouped, x, *rest, True)
    assert found[0][4].isnan().all() and found[0][5].isfinite().all()
    assert found[3].isnan().any()


@pytest.mark.parametrize("fp8_wgrad", [True, False])
def test_no_more_is_kept_than_one_by_one(fp8_wgrad):
    """Of activations, in bytes; the parameters apart."""

    def kept(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, gate_up, down)]
        apart, held = {leaf.data_ptr() for leaf in leaves[2:]}, {}

        def pack(tensor):
            if tensor is not None and tensor.data_ptr() not in apart:
                held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = function(leaves[0], indices, *leaves[1:], fp8_wgrad)
        assert y.requires_grad
        return sum(held.values())

    x, indices, weights, gate_up, down, _ = inputs(150)
    assert kept(grouped) < 0.7 * kept(defined)


def test_no_tokens():
    x, indices, weights, gate_up, down, dy = inputs(19)
    found = run(grouped, x[:0], indices[:0], weights[:0], gate_up, down, dy[:0], True)
    assert found[0].shape == (0, D) and not found[3].any() and not found[4].any()
