"""Experts as codes with gradients and adapters in the interpreter, next to the definition in bf16 and in fp64."""

import pytest
import torch
import torch.nn.functional as F
from gpu.cases_experts import RAGGED, E, K, Layer
from gpu.errors import poison_empty

from modeling_deepseek_moe.ops import four_bit
from modeling_deepseek_moe.ops.experts import low_rank, triton_trained
from modeling_deepseek_moe.ops.experts.low_rank import Copies, LowRank
from modeling_deepseek_moe.ops.experts.triton_codes import Codes, Matrix
from modeling_deepseek_moe.ops.experts.triton_products import Order
from modeling_deepseek_moe.ops.experts.triton_trained import GroupedSwiGlu, Scales

T = 21
RANKS = {"gate_up": (4,), "down": (20, 3)}  # of the pairs: two adapters are active on down


class Definition:
    """The experts' matrices in a dtype, as a `low_rank.Base`."""

    def __init__(self, layer: Layer, dtype: torch.dtype):
        self.matrices = [[matrix(dtype) for matrix in expert] for expert in layer.matrices]

    def gate_up(self, expert, x_RD):
        return F.linear(x_RD, torch.cat(self.matrices[expert][:2]))

    def down(self, expert, h_RI):
        return F.linear(h_RI, self.matrices[expert][2])


class Case:
    """A layer, pairs and a routing in which an expert gets no rows and some slots are another rank's, all from a seed."""

    def __init__(self, name: str, scales=(0.5, 2.0, 1.0)):
        self.width, self.size = RAGGED[name]
        self.layer, self.name, self.scales = Layer(name, self.width, self.size), name, scales
        g = torch.Generator().manual_seed(7)
        self.x, self.dy = (torch.randn((T, self.size), generator=g).bfloat16() for _ in range(2))
        self.indices = torch.rand((T, E), generator=g)[:, :-1].topk(K).indices
        self.indices[:9, 0] = 1  # many of one expert
        self.indices[:9, 1] = 2
        self.indices[3], self.indices[5, 1] = E, E
        self.weights = torch.rand((T, K), generator=g)
        self.matrices = []
        for rank, n, m in (
            *((rank, 2 * self.width, self.size) for rank in RANKS["gate_up"]),
            *((rank, self.size, self.width) for rank in RANKS["down"]),
        ):
            self.matrices.append(torch.randn((E, rank, m), generator=g) * m**-0.5)
            # as peft has it: experts last
            self.matrices.append((torch.randn((n, rank, E), generator=g) * rank**-0.5).permute(2, 0, 1))

    def leaves(self, dtype):
        """Hidden states, routing weights and the matrices of the pairs."""
        return [tensor.to(dtype, copy=True).requires_grad_() for tensor in (self.x, self.weights, *self.matrices)]

    def gradients(self, y, leaves, dtype):
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        return y.detach(), *torch.autograd.grad(y, asked, self.dy.to(dtype))

    def defined(self, dtype):
        x, weights, *matrices = leaves = self.leaves(dtype)
        pairs = [
            low_rank.Pair(a, b, s, Copies())
            for a, b, s in zip(matrices[::2], matrices[1::2], self.scales, strict=True)
        ]
        both = LowRank(tuple(pairs[: len(RANKS["gate_up"])]), tuple(pairs[len(RANKS["gate_up"]) :]))
        y = low_rank._defined(x, self.indices, weights, F.silu, Definition(self.layer, dtype), both)
        return self.gradients(y, leaves, dtype)

    def found(self, asked=range(8)):
        """By the kernels, of matrices in fp32 as peft has them; with the gradients of these leaves."""
        leaves = [leaf.detach().requires_grad_(i in asked) for i, leaf in enumerate(self.leaves(torch.float32))]
        x, weights, *matrices = leaves
        x = x.to(torch.bfloat16)
        stacks, codes = self.base()
        y = GroupedSwiGlu.apply(
            x, self.indices, weights, *stacks, codes, Scales(len(RANKS["gate_up"]), self.scales), *matrices
        )
        return self.gradients(y, leaves, torch.bfloat16)

    def base(self):
        gate_up, down, gate_up_scale, down_scale = self.layer.stacks
        if self.name == "bf16":
            return (gate_up, down), None
        gate_s, up_s = gate_up_scale.chunk(2, dim=1)
        parts = *zip(gate_up.chunk(2, dim=1), (gate_s, up_s), strict=True), (down, down_scale)
        return (None, None), Codes(*(Matrix.of(*part, self.name) for part in parts))


def check(case: Case) -> None:
    exact, bf16, found = case.defined(torch.float64), case.defined(torch.bfloat16), case.found()
    assert len(found) == 9
    for index, (y, wanted, by_reference) in enumerate(zip(found, exact, bf16, strict=True)):
        error, base = ((got.double() - wanted).norm() / wanted.norm() for got in (y, by_reference))
        assert error <= 2 * base, (index, error, base)
    assert not any(gradient[E - 1].any() for gradient in found[3:])  # the expert without rows
    assert not found[0][3].any() and not found[1][3].any() and not found[2][3].any()  # another rank's token


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("name", RAGGED)
def test_gradients_with_adapters(name):
    check(Case(name))


@pytest.mark.parametrize(
    ("asked", "outer", "goes_on"),
    [((2,), 1, True), ((3, 4), 2, True), ((1,), 0, True), ((5, 7), 2, False)],
    ids=["A-of-gate-up", "B-and-A", "weights", "B-of-down"],
)
def test_gradients_that_nobody_asks_for_are_not_computed(asked, outer, goes_on, monkeypatch):
    """As peft freezes A or B, trains down alone, or learns the routing alone."""
    case, computed = Case("nf4"), []
    every = case.found()
    for name in ("grouped_outer", "_swiglu_backward"):
        own = getattr(triton_trained, name)

        def counted(*given, name=name, own=own, **named):
            computed.append(name)
            return own(*given, **named)

        monkeypatch.setattr(triton_trained, name, counted)
    found = case.found(asked)
    assert computed.count("grouped_outer") == outer and ("_swiglu_backward" in computed) == goes_on
    assert all(torch.equal(got, every[1 + index]) for got, index in zip(found[1:], asked, strict=True))


def test_a_scale_for_each_token():
    """Zero where an adapter is not a token's."""
    scale_T = (torch.arange(T) % 3 > 0).float() * 2
    check(Case("nf4", (scale_T, 0.5, scale_T)))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_nested_scales(name):
    """As bitsandbytes quantises scales, expert by expert; runs of 256 end where no row does."""
    gate_up, down, *scales = Layer(name, 192, 192).stacks
    nested = []
    for stack in (*scales[0].chunk(2, dim=1), scales[1]):
        codes, absmax, tables, offsets = zip(*map(four_bit.nest, stack), strict=True)
        nested.append(four_bit.NestedScales(torch.stack(codes), torch.stack(absmax), tables[0], torch.stack(offsets)))
    matrices = [Matrix.of(*pair, name) for pair in zip((*gate_up.chunk(2, dim=1), down), nested, strict=True)]
    for matrix in matrices:
        codes, absmax, table, offset = matrix.scales
        for expert, found in enumerate(matrix._plain_scales()):
            own = four_bit.NestedScales(codes[expert], absmax[expert], table, offset[expert])
            torch.testing.assert_close(found, four_bit.expand(own))


def test_products_that_do_not_fit_are_refused():
    case = Case("int4")
    codes = case.base()[1]
    order = Order.of(case.indices, E)
    with pytest.raises(ValueError, match="found a product"):
        codes.gate_up_product(case.x[:, :-8], order)
    with pytest.raises(ValueError, match="transposed codes"):
        codes.down_back(case.x[:, :-8], order)
