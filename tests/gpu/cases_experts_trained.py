"""Products of rows sorted by expert, their gradients and FP8, in the interpreter, next to their references and to fp64."""

import pytest
import torch
from gpu.errors import poison_empty

from modeling_deepseek_moe.ops import _triton, block_fp8
from modeling_deepseek_moe.ops.block_fp8 import reference
from modeling_deepseek_moe.ops.experts import triton
from modeling_deepseek_moe.ops.experts import triton_products as products
from modeling_deepseek_moe.ops.experts import triton_trained as grouped
from modeling_deepseek_moe.ops.experts.trained import RoutedSwiGlu

E, K, T, D, I = 4, 2, 19, 136, 72  # noqa: E741


def routed(generator):
    """One expert without rows; slots that another rank serves, one token's both."""
    indices = torch.rand((T, E), generator=generator)[:, :-1].topk(K).indices
    indices[3], indices[5, 1] = E, E
    return indices


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(3)
    x = torch.randn((T, D), generator=g).bfloat16()
    gate_up = (torch.randn((E, 2 * I, D), generator=g) * 0.1).bfloat16()
    down = (torch.randn((E, D, I), generator=g) * 0.1).bfloat16()
    return x, routed(g), torch.rand((T, K), generator=g), gate_up, down, torch.randn((T, D), generator=g).bfloat16()


def run(function, dtype, x, indices, weights, gate_up, down, dy, *more):
    """The result and the gradients of hidden states, routing weights, gate_up and down."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weights, gate_up, down)]
    y = function.apply(leaves[0], indices, *leaves[1:], *more)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))


def test_gradients(inputs, monkeypatch):
    exact = run(RoutedSwiGlu, torch.float64, *inputs, torch.float64)
    bf16 = run(RoutedSwiGlu, torch.bfloat16, *inputs, torch.bfloat16)
    poison_empty(monkeypatch)
    found = run(grouped.GroupedSwiGlu, torch.bfloat16, *inputs, None, grouped.Scales(0, ()))
    for name, y, wanted, by_reference in zip(
        ("y", "x", "weights", "gate_up", "down"), found, exact, bf16, strict=True
    ):
        error, base = ((got.double() - wanted).norm() / wanted.norm() for got in (y, by_reference))
        assert error <= 2 * base, (name, error, base)
    assert not found[3][E - 1].any() and not found[4][E - 1].any()  # the expert without rows
    assert not found[2][3].any()


@pytest.mark.parametrize("size", [130, 300, 1200])
def test_quantize_to_the_bit(size):
    x = torch.randn((5, size), generator=torch.Generator().manual_seed(4)) * torch.tensor(
        [[1], [1e-20], [1e20], [0], [1]]
    )
    x[4, 128] = float("nan")
    found, wanted = products.quantize(x), reference.quantize_tiles(x, False)
    assert torch.equal(found[1].nan_to_num(-1), wanted[1].nan_to_num(-1))
    assert torch.equal(found[0].float().nan_to_num(-1), wanted[0].float().nan_to_num(-1))


def test_by_codes():
    """A layer of codes times codes, next to the same in plain torch."""
    g, width, size = torch.Generator().manual_seed(6), 72, 136
    x, indices = torch.randn((T, size), generator=g).bfloat16(), routed(g)
    weights = torch.rand((T, K), generator=g)
    experts = [
        [
            block_fp8.quantize(torch.randn(shape, generator=g) * 0.1)
            for shape in ((width, size), (width, size), (size, width))
        ]
        for _ in range(E)
    ]
    stacks = [
        torch.stack([torch.cat([parts[i][of].view(torch.uint8) for i in which]) for parts in experts]).view(dtype)
        for of, dtype in enumerate((torch.float8_e4m3fn, torch.float32))
        for which in ((0, 1), (2,))
    ]
    found = products.by_codes(x, indices, weights, *stacks).view(T, K, size)
    for t, k in (indices < E).nonzero().tolist():
        row = x[t : t + 1]
        gate, up = (_w8a8(row, *pair).bfloat16().float() for pair in experts[indices[t, k]][:2])
        wanted = weights[t, k] * _w8a8(gate.sigmoid() * gate * up, *experts[indices[t, k]][2])
        # a code may fall on the other side of a middle
        assert (found[t, k] - wanted[0]).norm() < 0.01 * wanted.norm()


def _w8a8(x, codes, scale):
    return block_fp8.gemm(*block_fp8.quantize_tiles(x), codes, block_fp8.row_scales(scale, len(codes)))


def test_fp8_products():
    """Codes against codes; gate and up have blocks of their own."""
    g, half, k = torch.Generator().manual_seed(5), 72, 260
    indices = routed(g)
    order = products.Order.of(indices, E)
    a = block_fp8.quantize_tiles(torch.randn((T, k), generator=g))
    pairs = [[block_fp8.quantize(torch.randn((half, k), generator=g)) for _ in range(2)] for _ in range(E)]
    b, scale = (torch.stack([torch.cat([p[i].view(torch.uint8) for p in pair]) for pair in pairs]) for i in (0, 1))
    b, scale = b.view(torch.float8_e4m3fn), scale.view(torch.float32)
    found = products.grouped_product(
        a[0], b, order, a[1], scale, by_token=True, by_slot=True, half=half, dtype=torch.float32
    )
    for slot, expert in enumerate(indices.flatten().tolist()):
        if expert == E:
            continue
        row = [tensor[slot // K : slot // K + 1] for tensor in a]
        wanted = [block_fp8.gemm(*row, codes, block_fp8.row_scales(s, half)) for codes, s in pairs[expert]]
        torch.testing.assert_close(found[slot], torch.cat(wanted, dim=1)[0], rtol=1e-5, atol=1e-5)


def test_factors_that_do_not_fit_are_refused(inputs):
    x, indices, _, gate_up, _, _ = inputs
    order = products.Order.of(indices, E)
    with pytest.raises(ValueError, match="found factors"):
        products.grouped_product(x[:, :-1], gate_up, order, by_token=True)
    with pytest.raises(ValueError, match="found factors"):
        products.grouped_product(x.float(), gate_up, order, by_token=True)


@pytest.mark.parametrize(("generation", "quantises"), [(80, False), (89, True)])
def test_prompts_are_quantised_where_the_card_multiplies_codes(generation, quantises, monkeypatch):
    g, width, size, tokens = torch.Generator().manual_seed(7), 64, 128, 40
    stacks = [torch.randint(0, 120, shape, dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)
              for shape in ((E, 2 * width, size), (E, size, width))]  # fmt: skip
    stacks += [torch.full(shape, 1e-3) for shape in ((E, 2, 1), (E, 1, 1))]
    x, weights = torch.randn((tokens, size), generator=g).bfloat16(), torch.rand((tokens, K), generator=g)
    indices = torch.rand((tokens, E), generator=g).topk(K).indices
    monkeypatch.setattr(_triton, "OLDEST", generation)
    monkeypatch.setattr(_triton, "capability", lambda device: generation)
    found = triton.slot_results(x, indices, weights, stacks, "fp8")
    assert torch.equal(found, products.by_codes(x, indices, weights, *stacks)) == quantises
    assert found.isfinite().all()
