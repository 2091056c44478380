"""Routed experts with low-rank differences added to their matrices, ``W_e + s · B_e · A_e``, as an adapter has them.

No difference is ever formed: next to each product with ``W_e`` comes one with ``A_e`` and one with ``B_e``, for the rows that
are routed to the expert. The base may be anything that has products with the matrices of one expert.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width, r rank, S = T·K slots in the experts' order,
R rows routed to one expert, [N, M] the shape of the matrix of one expert that a pair belongs to.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops._native import unavailable_reason
from modeling_deepseek_moe.ops.experts import cpu
from modeling_deepseek_moe.ops.experts.operands import operands, unsupported_reason
from modeling_deepseek_moe.ops.experts.reference import Slots
from modeling_deepseek_moe.ops.linear import linear

FEW_TOKENS = 8
MANY_TOKENS = 32  # of a prompt, next to which it is little to look at all values of the kept copies' matrices
SAMPLES = 4  # of the rows that are looked at
T = TypeVar("T")


class Copies:
    """Copies of one pair's matrices as they are read fastest, kept until a matrix is another. Pickles of it are empty."""

    def __init__(self):
        self._of: dict[str, tuple] = {}

    def __reduce__(self):
        return type(self), ()

    def get(self, name: str, make: Callable[[], T], *matrices: torch.Tensor, all_values: bool = False) -> T:
        """What ``make`` makes of ``matrices``, which are ``[E, ·, ·]``.

        What is written by way of ``.data``, or to tensors made in inference mode, has no version: some values of each expert are
        looked at, and with ``all_values`` sums of all.
        """
        key, seen = [], []
        for matrix in matrices:
            key.append((matrix.data_ptr(), None if matrix.is_inference() else matrix._version, matrix.shape))
            step = max(1, matrix.shape[2] // SAMPLES)
            seen.append(matrix.detach()[:, matrix.shape[1] // 2, ::step])
        kept = self._of.get(name)
        is_same = kept is not None and kept[0] == key and all(map(torch.equal, kept[1], seen))
        if is_same and all_values:
            is_same = all(map(torch.equal, kept[2], map(_sums, matrices)))
        if not is_same:
            sums = list(map(_sums, matrices))
            kept = self._of[name] = (key, [values.clone() for values in seen], sums, make())
        return kept[3]


def _sums(matrix: torch.Tensor) -> torch.Tensor:
    """Of all values, weighted by their place along the dimension that is contiguous in memory."""
    rows = matrix.detach().movedim(matrix.stride().index(min(matrix.stride())), -1).float()
    return rows @ torch.linspace(1, 2, rows.shape[-1], device=rows.device)


class Pair(NamedTuple):
    """``a [E, r, M]``, ``b [E, N, r]`` and s: one for all tokens, or one for each, ``[T]``, zero where it is not theirs.

    ``copies`` are the caller's, for calls without gradients.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float | torch.Tensor
    copies: Copies

    def turned(self) -> "Pair":
        """The same with a B that lies expert by expert."""
        return self._replace(b=self.copies.get("b", lambda: self.b.detach().contiguous(), self.b))

    def packed(self, all_values: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
        """As `cpu.run_low_rank` takes it."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            bf16 = self.a.detach().to(torch.bfloat16), self.b.detach().transpose(1, 2).to(torch.bfloat16)
            return bf16[0].contiguous(), bf16[1].contiguous()

        return *self.copies.get("bf16", make, self.a, self.b, all_values=all_values), float(self.scale)


class LowRank(NamedTuple):
    """What is added to ``gate_up_proj [2I, D]`` and to ``down_proj [D, I]`` of each expert."""

    gate_up: tuple[Pair, ...] = ()
    down: tuple[Pair, ...] = ()


class Base(Protocol):
    """Products with the matrices of one expert of a layer; those of the backward pass with their transposes."""

    module: nn.Module

    def is_trained(self) -> bool: ...

    def gate_up(self, expert: int, x_RD: torch.Tensor) -> torch.Tensor: ...

    def down(self, expert: int, h_RI: torch.Tensor) -> torch.Tensor: ...

    def gate_up_back(self, expert: int, d_R2I: torch.Tensor) -> torch.Tensor: ...

    def down_back(self, expert: int, d_RD: torch.Tensor) -> torch.Tensor: ...


class Stacks:
    """Floating-point stacks as a `Base`."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.gate_up_proj, self.down_proj = module.gate_up_proj, module.down_proj

    def is_trained(self) -> bool:
        return self.gate_up_proj.requires_grad or self.down_proj.requires_grad

    def gate_up(self, expert: int, x_RD: torch.Tensor) -> torch.Tensor:
        return _product(x_RD, self.gate_up_proj[expert])

    def down(self, expert: int, h_RI: torch.Tensor) -> torch.Tensor:
        return _product(h_RI, self.down_proj[expert])

    def gate_up_back(self, expert: int, d_R2I: torch.Tensor) -> torch.Tensor:
        return d_R2I @ self.gate_up_proj[expert].to(d_R2I.dtype)

    def down_back(self, expert: int, d_RD: torch.Tensor) -> torch.Tensor:
        return d_RD @ self.down_proj[expert].to(d_RD.dtype)


class Codes:
    """Experts that stay in a checkpoint's format as a `Base`: a backward pass decodes one matrix at a time."""

    def __init__(self, module: nn.Module):
        self.module = module

    def is_trained(self) -> bool:
        return False

    def gate_up(self, expert: int, x_RD: torch.Tensor) -> torch.Tensor:
        gate, up, _ = self.module.matrices(expert).values()
        multiply = self.module.weight_format.multiply
        return torch.cat((multiply(x_RD, *gate), multiply(x_RD, *up)), dim=-1)

    def down(self, expert: int, h_RI: torch.Tensor) -> torch.Tensor:
        *_, down = self.module.matrices(expert).values()
        return self.module.weight_format.multiply(h_RI, *down)

    def gate_up_back(self, expert: int, d_R2I: torch.Tensor) -> torch.Tensor:
        gate, up, _ = self.module.matrices(expert).values()
        d_gate, d_up = d_R2I.chunk(2, dim=-1)
        decode = self.module.dequantized
        return (d_gate @ decode(gate, d_R2I.dtype)).addmm_(d_up, decode(up, d_R2I.dtype))

    def down_back(self, expert: int, d_RD: torch.Tensor) -> torch.Tensor:
        *_, down = self.module.matrices(expert).values()
        return d_RD @ self.module.dequantized(down, d_RD.dtype)


def routed_low_rank(
    hidden_TD: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor, base: Base, low_rank: LowRank
) -> torch.Tensor:
    """``[T, D]`` in the dtype of ``hidden_TD``, or autocast's.

    Differentiable in the hidden states, the weights of the routing and the pairs, and in stacks that are trained too.
    """
    device, act_fn = hidden_TD.device.type, base.module.act_fn
    autocast, gradients = torch.is_autocast_enabled(device), torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_TD.dtype
    if (gradients and base.is_trained()) or not cpu.is_silu(act_fn):
        return _defined(hidden_TD, topk_indices, topk_weights, act_fn, base, low_rank)
    computes_alone = device == "cpu" and not (autocast or gradients or torch.compiler.is_compiling())
    if computes_alone and may_use(CPU, unavailable_reason()):
        found = _native(hidden_TD, topk_indices, topk_weights, base, low_rank)
        if found is not None:
            return found
        if len(hidden_TD) <= FEW_TOKENS:
            return _few(hidden_TD, topk_indices, topk_weights, base, low_rank)
    pairs = (*low_rank.gate_up, *low_rank.down)
    matrices = [matrix for pair in pairs for matrix in (pair.a, pair.b.contiguous())]
    if autocast:
        matrices = [matrix.to(dtype) for matrix in matrices]
    scales = [pair.scale for pair in pairs]
    return RoutedLowRank.apply(
        *(hidden_TD, topk_indices, topk_weights, base, dtype, len(low_rank.gate_up), scales), *matrices
    )


def may_pass_gradients(base: Base, hidden_TD: torch.Tensor, topk_weights: torch.Tensor) -> bool:
    """Whether a constant base without pairs is for `routed_low_rank`: gradients are to pass through it on a CPU."""
    wanted = torch.is_grad_enabled() and (hidden_TD.requires_grad or topk_weights.requires_grad)
    if not wanted or hidden_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return cpu.is_silu(base.module.act_fn) and may_use(CPU, unavailable_reason())


def _defined(hidden_TD, topk_indices, topk_weights, act_fn, base: Base, low_rank: LowRank) -> torch.Tensor:
    """The definition, by autograd."""
    slots = Slots.of(topk_indices, len(next(iter((*low_rank.gate_up, *low_rank.down))).a))
    out_TD = torch.zeros_like(hidden_TD)
    for expert, rows, tokens in slots.experts():
        x_RD = hidden_TD[tokens]
        gate, up = _add(base.gate_up(expert, x_RD), x_RD, low_rank.gate_up, expert, tokens).chunk(2, dim=-1)
        hidden_RI = act_fn(gate) * up
        y_RD = _add(base.down(expert, hidden_RI), hidden_RI, low_rank.down, expert, tokens)
        out_TD = out_TD.index_add(0, tokens, (y_RD * topk_weights.flatten()[slots.order[rows], None]).to(out_TD.dtype))
    return out_TD


class RoutedLowRank(torch.autograd.Function):
    """`_defined` for SiLU and a constant base; of the activations it keeps the products of gate and up, as `trained` does.

    Args:
        count: of the pairs, those that are gate's and up's, which come first.
        matrices: A and B of one pair after the other.
    """

    @staticmethod
    def forward(ctx, hidden_TD, topk_indices, topk_weights, base, dtype, count, scales, *matrices):
        ctx.dtypes, hidden_TD = (hidden_TD.dtype, topk_weights.dtype), hidden_TD.to(dtype)
        slots = Slots.of(topk_indices, base.module.num_experts)
        weights_S = topk_weights.flatten()[slots.order].to(torch.promote_types(dtype, torch.float32)).unsqueeze(1)
        inner, y_SD = [], hidden_TD.new_empty((len(slots.order), hidden_TD.shape[1]))
        pairs = _pairs(matrices, scales)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for expert, rows, tokens in slots.experts():
                x_RD = hidden_TD.index_select(0, tokens)
                inner_R2I = _add(base.gate_up(expert, x_RD), x_RD, pairs[:count], expert, tokens)
                gate, up = inner_R2I.chunk(2, dim=1)
                weighted = F.silu(gate).mul_(up).mul_(weights_S[rows]).to(dtype)
                y_SD[rows] = _add(base.down(expert, weighted), weighted, pairs[count:], expert, tokens)
                inner.append(inner_R2I)
            ctx.save_for_backward(hidden_TD, weights_S, *inner, *matrices)
            ctx.slots, ctx.base, ctx.count, ctx.scales, ctx.hit = slots, base, count, scales, len(inner)
            return slots.combine(y_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        hidden_TD, weights_S, *saved = ctx.saved_tensors
        inner, matrices = saved[: ctx.hit], saved[ctx.hit :]
        slots, base, needs = ctx.slots, ctx.base, ctx.needs_input_grad
        pairs, dtype = _pairs(matrices, ctx.scales), hidden_TD.dtype
        grads = [_like(matrix, slots) if need else None for matrix, need in zip(matrices, needs[7:], strict=True)]
        of_pairs = list(zip(grads[::2], grads[1::2], strict=True))
        reaches_inner = needs[0] or any(needs[7 : 7 + 2 * ctx.count])
        dy_TD = dy_TD.to(dtype).contiguous()
        dx_SD = hidden_TD.new_empty((len(slots.order), hidden_TD.shape[1])) if needs[0] else None
        d_weights = torch.zeros_like(weights_S) if needs[2] else None
        with torch.autocast(dy_TD.device.type, enabled=False):
            for (expert, rows, tokens), inner_R2I in zip(slots.experts(), inner, strict=True):
                gate, up = inner_R2I.chunk(2, dim=1)
                silu, weight = F.silu(gate), weights_S[rows]
                hidden, dy_RD = silu * up, dy_TD.index_select(0, tokens)
                weighted = (hidden * weight).to(dtype)
                d_hidden = base.down_back(expert, dy_RD)
                _add_back(d_hidden, dy_RD, weighted, pairs[ctx.count :], of_pairs[ctx.count :], expert, tokens)
                if needs[2]:
                    torch.sum(d_hidden * hidden, 1, keepdim=True, dtype=weight.dtype, out=d_weights[rows])
                if not reaches_inner:
                    continue
                d_hidden = (d_hidden * weight).to(dtype)
                d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
                d_inner = torch.cat((d_gate, d_hidden * silu), dim=1)
                x_RD = hidden_TD.index_select(0, tokens)
                dx_RD = base.gate_up_back(expert, d_inner) if needs[0] else None
                _add_back(dx_RD, d_inner, x_RD, pairs[: ctx.count], of_pairs[: ctx.count], expert, tokens)
                if needs[0]:
                    dx_SD[rows] = dx_RD
            dx = slots.combine(dx_SD).to(ctx.dtypes[0]) if needs[0] else None
        if needs[2]:
            d_weights = d_weights.flatten()[slots.places].to(ctx.dtypes[1])
        return dx, None, d_weights, None, None, None, None, *grads


def _native(hidden_TD, topk_indices, topk_weights, base: Base, low_rank: LowRank) -> torch.Tensor | None:
    """Tokens of bf16 in one call of the engine, with the pairs in bf16 too; ``None`` where it has none for them."""
    pairs = (low_rank.gate_up, low_rank.down)
    if hidden_TD.dtype != torch.bfloat16 or any(len(own) > 1 for own in pairs):
        return None
    if any(isinstance(pair.scale, torch.Tensor) and pair.scale.ndim for own in pairs for pair in own):
        return None
    weights = operands(base.module)
    if weights.addresses is None or unsupported_reason(base.module, weights, hidden_TD) is not None:
        return None
    packed = [own[0].packed(all_values=len(hidden_TD) > MANY_TOKENS) if own else None for own in pairs]
    return cpu.run_low_rank(
        *(hidden_TD, topk_indices, topk_weights, weights.addresses, weights.width, weights.dtype, weights.kind),
        *packed,
    )


def _few(hidden_TD, topk_indices, topk_weights, base: Base, low_rank: LowRank) -> torch.Tensor:
    """A few tokens without gradients, in as few operations as there are products."""
    low_rank = LowRank(*(tuple(pair.turned() for pair in own) for own in low_rank))
    weights = topk_weights.float()
    rows: dict[int, list[tuple[int, int]]] = {}
    experts = next(pair.a for pair in (*low_rank.gate_up, *low_rank.down)).shape[0]
    for token, chosen in enumerate(topk_indices.tolist()):
        for place, expert in enumerate(chosen):
            if expert < experts:  # others are served by another expert-parallel rank
                rows.setdefault(expert, []).append((token, place))
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
    for expert, slots in sorted(rows.items()):
        tokens, places = torch.tensor(slots).unbind(1)
        x_RD = hidden_TD[tokens]
        inner = _add(base.gate_up(expert, x_RD), x_RD, low_rank.gate_up, expert, tokens)
        gate, up = inner.chunk(2, dim=1)
        weighted = F.silu(gate).mul_(up).mul_(weights[tokens, places, None])
        out_TD.index_add_(
            0, tokens, _add(base.down(expert, weighted), weighted, low_rank.down, expert, tokens).float()
        )
    return out_TD.to(hidden_TD.dtype)


def _pairs(matrices, scales) -> list[tuple]:
    return list(zip(matrices[::2], matrices[1::2], scales, strict=True))


def _add(y: torch.Tensor, x: torch.Tensor, pairs, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """``y [R, N]`` with s·x·Aᵀ·Bᵀ of each pair added in place."""
    for pair in pairs:
        a, b, scale = _of(pair, expert, tokens, x)
        low = F.linear(x.to(a.dtype), a) * scale
        if y.dtype == b.dtype:
            y.addmm_(low, b.T)
        else:
            y += low @ b.T
    return y


def _add_back(dx: torch.Tensor | None, dy, x, pairs, grads, expert: int, tokens) -> None:
    """The gradients of one expert's pairs, and what they add to ``dx [R, M]``, of ``dy [R, N]`` and ``x [R, M]``."""
    for pair, (d_a, d_b) in zip(pairs, grads, strict=True):
        a, b, scale = _of(pair, expert, tokens, x)
        dy_low, x_low = dy.to(a.dtype), x.to(a.dtype)
        d_low = (dy_low @ b) * scale  # of the product with A
        if d_b is not None:
            d_b[expert] = dy_low.T @ (F.linear(x_low, a) * scale)
        if d_a is not None:
            d_a[expert] = d_low.T @ x_low
        if dx is not None:
            dx += (d_low @ a).to(dx.dtype)


def _of(pair, expert: int, tokens: torch.Tensor, x: torch.Tensor):
    """A, B and s of one expert, in at least the dtype of ``x``."""
    a, b, scale, *_ = pair
    dtype = torch.promote_types(a.dtype, x.dtype)
    if isinstance(scale, torch.Tensor) and scale.ndim:
        scale = scale[tokens].unsqueeze(1).to(dtype)
    return a[expert].to(dtype), b[expert].to(dtype), scale


def _like(matrix: torch.Tensor, slots: Slots) -> torch.Tensor:
    """An empty gradient, in which experts that were not hit are zero."""
    gradient = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for expert, count in enumerate(slots.counts):
        if not count:
            gradient[expert] = 0
    return gradient


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x · Wᵀ`` in the dtype of ``x``."""
    if weight.dtype in (x.dtype, torch.bfloat16) and x.dtype in (torch.float32, torch.bfloat16):
        return linear(x, weight)
    return F.linear(x, weight.to(x.dtype))
