"""What the tests of the CPU engine share: weights, what they compute in fp64, and how wrong a result may be.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width.
"""

import ctypes
import mmap
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from releases import dequantize_independently

from modeling_deepseek_moe.engine import next_token, runs
from modeling_deepseek_moe.ops import _native, block_fp8

FP8 = torch.float8_e4m3fn
INSTRUCTION_SETS = _native.instruction_sets()
BACKENDS = [f"cpu:{name}" for name in INSTRUCTION_SETS]
needs_engine = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the CPU engine was not built")
every_isa = pytest.mark.parametrize("isa", BACKENDS, ids=INSTRUCTION_SETS)


def by_layers_alone(patch: pytest.MonkeyPatch) -> None:
    """Models call their layers, and the engine what those ask of it."""
    patch.setattr(next_token, "logits", lambda *_: None)
    patch.setattr(runs, "_calls", lambda model, layers, *_: layers)


def random_fp8(shape, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, all of them but NaN, and random positive scales, for a matrix or a stack of them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scale_shape = (*shape[:-2], *block_fp8.scale_shape(shape[-2:]))
    return codes.view(FP8), torch.rand(scale_shape, generator=generator) * 1e-2 + 1e-4


def normal_fp8(shape, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """As `random_fp8`, but of normal codes alone, as nearly all of a trained weight's are: kernels have a faster way."""
    codes, scale = random_fp8(shape, seed)
    codes = codes.view(torch.uint8)
    codes[(codes & 0x7F) < 8] += 8
    return codes.view(FP8), scale


def exact(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The weight in fp64."""
    return weight.double() if scale is None else dequantize_independently(weight, scale)


def assert_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """``y`` is x · weightᵀ + bias (weight in fp64), rounded once to its dtype from sums in fp32."""
    wanted = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    if bias is not None:
        wanted, size = wanted + bias.double(), size + bias.double().abs()
    # NaN is no error here: whoever tests it compares where it is
    error = (y.double() - wanted).abs()
    bound = torch.finfo(y.dtype).eps / 2 * wanted.abs() * 1.001 + 2e-6 * size + torch.finfo(y.dtype).tiny
    worst = (error / bound).max() if error.numel() else 0
    assert (error <= bound).all(), f"{worst:.3g} times the bound; x {list(x.shape)}, weight {list(weight.shape)}"


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in fp64."""
    norm = wanted.double().norm()
    return ((found.double() - wanted.double()).norm() / norm).item() if norm else found.double().norm().item()


@dataclass
class Experts:
    """Routed experts, stacked; ``scales`` for FP8 weights: of gate, up and down, each ``[E, ·, ·]``."""

    gate_up: torch.Tensor
    down: torch.Tensor
    scales: tuple[torch.Tensor, ...] | None

    @classmethod
    def random(cls, dtype: torch.dtype, experts: int, hidden: int, width: int, seed: int = 0) -> "Experts":
        shapes = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
        if dtype == FP8:
            (gate, gate_scale), (up, up_scale), (down, down_scale) = (
                random_fp8(shape, seed + i) for i, shape in enumerate(shapes)
            )
            # values of about 1/√D, so that SwiGLU sees both of its arms
            scales = tuple(
                scale / 2 / shape[-1] ** 0.5
                for scale, shape in zip((gate_scale, up_scale, down_scale), shapes, strict=True)
            )
            return cls(torch.cat((gate.view(torch.uint8), up.view(torch.uint8)), 1).view(FP8), down, scales)
        generator = torch.Generator().manual_seed(seed)
        gate, up, down = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
        return cls(torch.cat((gate, up), 1).to(dtype), down.to(dtype), None)

    @property
    def width(self) -> int:
        return self.down.shape[2]

    @property
    def stacked_scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.scales is None:
            return None, None
        gate, up, down = self.scales
        return torch.cat((gate, up), 1).contiguous(), down

    def matrices(self, expert: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Gate, up and down with their scales: views."""
        weights = (self.gate_up[expert, : self.width], self.gate_up[expert, self.width :], self.down[expert])
        scales = (None,) * 3 if self.scales is None else [scale[expert] for scale in self.scales]
        return list(zip(weights, scales, strict=True))

    def addresses(self) -> torch.Tensor:
        return torch.tensor(
            [
                [[weight.data_ptr(), 0 if scale is None else scale.data_ptr()] for weight, scale in self.matrices(e)]
                for e in range(len(self.down))
            ]
        )

    def reference(self, x, indices, weights, dtype: torch.dtype) -> torch.Tensor:
        """Expert by expert in plain torch, everything in ``dtype``; slots of no expert are left out."""
        out, x = torch.zeros(x.shape, dtype=dtype), x.to(dtype)
        for e in range(len(self.down)):
            tokens, slots = (indices == e).nonzero(as_tuple=True)
            if len(tokens):
                gate, up, down = (exact(*matrix).to(dtype) for matrix in self.matrices(e))
                h = F.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)
                out.index_add_(0, tokens, (h @ down.T * weights[tokens, slots, None].to(dtype)))
        return out


def random_routing(tokens: int, top_k: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, with duplicates and some of no expert (``experts``), and weights."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, experts + 1, (tokens, top_k), generator=generator)
    return indices, torch.rand((tokens, top_k), generator=generator)


LIBC = ctypes.CDLL(None, use_errno=True)
_guards = []  # their memory must outlive the tensors in it


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy with memory that no one may touch right after it, or right before it: doing so kills the process."""
    page = mmap.PAGESIZE
    room = -(-max(tensor.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for address in (base, base + page + room):
        if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page + room - tensor.nbytes if at_end else page
    _guards.append(memory)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=start).view(tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)
