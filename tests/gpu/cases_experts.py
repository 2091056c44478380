"""Routed experts' kernels in the interpreter, next to what the formats' references compute and to fp64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpu.errors import poison_empty

from modeling_deepseek_moe.formats import by_name
from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops.experts import triton as experts
from modeling_deepseek_moe.ops.experts.reference import run_experts

E, K = 5, 2
RAGGED = {
    "bf16": (72, 132),
    "fp8": (136, 260),
    "int4": (96, 160),
    "mxfp4": (96, 160),
    "nf4": (64, 192),
    "fp4": (64, 192),
}


class Layer:
    """Stacks of one format, and each expert's matrices in any dtype."""

    def __init__(self, name: str, width: int, size: int):
        self.name, self.matrices = name, []
        generator, coded = torch.Generator().manual_seed(1), []
        for _ in range(E):
            parts = [
                torch.randn(shape, generator=generator) * 0.1 * torch.randn((shape[0], 1), generator=generator).exp()
                for shape in ((width, size), (width, size), (size, width))
            ]
            if name == "bf16":
                coded.append([(part.bfloat16(), None) for part in parts])
                self.matrices.append([part.bfloat16().to for part in parts])
            else:
                coded.append([by_name(name).quantize(part) for part in parts])
                self.matrices.append([partial(by_name(name).dequantize, *pair) for pair in coded[-1]])
        self.stacks = [self._stack(coded, which, of) for of in (0, 1) for which in ((0, 1), (2,))]

    @staticmethod
    def _stack(coded, which, of):
        if coded[0][0][of] is None:
            return None
        raw = torch.stack([torch.cat([parts[i][of].view(torch.uint8) for i in which]) for parts in coded])
        return raw.view(coded[0][0][of].dtype)

    def by_reference(self, x, indices, weights, dtype):
        """The definition, with weights rounded to ``dtype``."""

        def expert(index, rows):
            gate, up, down = (matrix(dtype) for matrix in self.matrices[index])
            return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)

        return run_experts(x.to(dtype), indices, weights.to(dtype), expert, E)

    def by_kernels(self, x, indices, weights):
        return experts.experts(x, indices, weights, *self.stacks, self.name)


def errors(layer: Layer, x, indices, weights) -> tuple[float, float]:
    """Of the kernels and of the reference in bf16, relative to fp64."""
    exact = layer.by_reference(x, indices, weights, torch.float64)
    found, reference = layer.by_kernels(x, indices, weights), layer.by_reference(x, indices, weights, torch.bfloat16)
    return tuple(((y.double() - exact).norm() / exact.norm()).item() for y in (found, reference))


def routed(tokens: int, size: int):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((tokens, size), generator=generator).bfloat16()
    indices = torch.rand((tokens, E), generator=generator)[:, :-1].topk(K).indices  # the last expert gets none
    return x, indices, torch.rand((tokens, K), generator=generator)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("name", RAGGED)
def test_few_tokens(name):
    """A slot a program; one slot is another rank's."""
    width, size = RAGGED[name]
    layer, (x, indices, weights) = Layer(name, width, size), routed(2, size)
    indices[1, 0] = E
    found, reference = errors(layer, x, indices, weights)
    assert found <= 2 * reference, (found, reference)


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, 20) for name in RAGGED), ("fp8", 42), ("int4", 42), ("fp4", 42)]
)
def test_many_tokens(name, tokens):
    """Rows of an expert together: tiles that are not full, an expert without rows, slots of another rank."""
    width, size = RAGGED[name]
    layer, (x, indices, weights) = Layer(name, width, size), routed(tokens, size)
    assert experts._way(2 * tokens, E) == ("many" if tokens > 40 else "few")
    indices[3], indices[7, 1] = E, E
    found, reference = errors(layer, x, indices, weights)
    assert found <= 2 * reference, (found, reference)


@pytest.mark.parametrize("slots", [1, 40, 2500])
def test_plan_sorts_by_expert(slots):
    kernels = _triton.kernels("experts")
    indices = torch.randint(0, E + 1, (slots,), generator=torch.Generator().manual_seed(slots))
    order, ends = torch.full((slots,), -1, dtype=torch.int32), torch.full((E,), -1, dtype=torch.int32)
    _triton.launch(kernels.plan, (E,), indices.device, indices, order, ends, slots, BLOCK=1024)
    served = int((indices < E).sum())
    assert torch.equal(order[:served].long(), indices.argsort(stable=True)[:served])
    assert torch.equal(ends.long(), torch.bincount(indices, minlength=E + 1)[:E].cumsum(0))


def test_no_tokens():
    layer = Layer("bf16", 64, 128)
    assert layer.by_kernels(*routed(0, 128)).shape == (0, 128)
