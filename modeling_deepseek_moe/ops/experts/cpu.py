"""Routed experts and SwiGLU layers on the CPU engine, a layer in one call.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width.
"""

from ctypes import byref
from functools import lru_cache

import numpy as np
import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._hooks import every_module_is_hooked, is_hooked
from modeling_deepseek_moe.ops._library import PLAIN, define
from modeling_deepseek_moe.ops._structs import FOUR_BIT, NESTED, Experts, LowRank
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit
from modeling_deepseek_moe.ops.four_bit.reference import KINDS

WEIGHTS = (torch.float8_e4m3fn, torch.bfloat16)
# Packed inputs and SwiGLU outputs of one call; more tokens are computed a part at a time.
WORKSPACE_BYTES = 256 << 20


def is_silu(act_fn: torch.nn.Module) -> bool:
    """Whether calling it is SiLU and nothing else: hooks there are how the activations of neurons are looked at."""
    silu = isinstance(act_fn, torch.nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"
    return silu and not is_hooked(act_fn) and not every_module_is_hooked()


def unsupported_reason(x: torch.Tensor, act_fn: torch.nn.Module, *weights: torch.Tensor) -> str | None:
    """Why the engine cannot run SwiGLU layers with these activations and weights; ``None`` if it can."""
    reason = _native.unsupported_activations(x)
    if reason is not None:
        return reason
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        return "computes no gradients"
    if not is_silu(act_fn):
        hooked = " with a hook" if is_hooked(act_fn) else ""
        return f"has silu for its activation function, found {type(act_fn).__name__}{hooked}"
    for weight in weights:
        if type(weight) not in PLAIN:
            return f"needs plain tensors, found {type(weight).__name__}"
        if weight.dtype not in WEIGHTS:
            return f"takes weights in {', '.join(str(dtype) for dtype in WEIGHTS)}, found {weight.dtype}"
        if weight.device.type != "cpu" or not weight.is_contiguous():
            return f"needs contiguous weights on the CPU, found {weight.device}, strides {weight.stride()}"
    return None


def accumulate(
    out_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    addresses: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    kind: str | None = None,
) -> None:
    """Add the experts' weighted outputs to ``out_TD`` (fp32).

    Each element is summed over ascending experts, and an expert whose address is zero is left out: calls with one
    ascending group of experts after another give the bits that one call with all of them gives.

    Args:
        hidden_TD: bf16, fp32 or fp16 activations.
        topk_indices: ``[T, K]`` int64; an index that is no expert marks a slot that is served elsewhere.
        topk_weights: ``[T, K]``.
        addresses: ``[E, 3, 2]`` int64: of the codes and scales of gate ``[I, D]``, up ``[I, D]``, down ``[D, I]``.
        width: I.
        dtype: of the weights, one of `WEIGHTS`.
        kind: of codes of four bits, one of `_structs.FOUR_BIT`, whatever their ``dtype``; D and I are whole groups.
    """
    if out_TD.shape != hidden_TD.shape or out_TD.dtype != torch.float32 or not out_TD.is_contiguous():
        raise ValueError(
            f"experts: found an output {_native.describe(out_TD)}, wanted {list(hidden_TD.shape)} in fp32"
        )
    _run(hidden_TD, topk_indices, topk_weights, addresses, width, dtype, kind, out_TD, None)


def _run(hidden_TD, topk_indices, topk_weights, addresses, width, dtype, kind, sums_TD, out_TD) -> None:
    """As `accumulate`, into ``sums_TD``; or from nothing into ``out_TD``, of the activations' dtype. The other is ``None``."""
    shape, slots = hidden_TD.shape, topk_indices.shape
    if (
        len(shape) != 2
        or hidden_TD.dtype not in _native.ACTIVATIONS
        or len(slots) != 2
        or slots[0] != shape[0]
        or topk_indices.dtype != torch.int64
        or topk_weights.shape != slots
    ):
        found = ", ".join(map(_native.describe, (hidden_TD, topk_indices, topk_weights)))
        raise ValueError(f"experts: found {found}, wanted activations [T, D], indices [T, K] in int64, weights [T, K]")
    if addresses.ndim != 3 or addresses.shape[1:] != (3, 2) or addresses.dtype != torch.int64:
        raise ValueError(f"experts: found addresses {_native.describe(addresses)}, wanted [E, 3, 2] in int64")
    (tokens, hidden), top_k, experts = shape, slots[1], addresses.shape[0]
    if not (tokens and top_k and hidden and width and experts):
        if out_TD is not None:
            out_TD.zero_()
        return
    if kind is not None:
        check_groups(kind, hidden, width)
    hidden_TD, topk_indices = hidden_TD.contiguous(), topk_indices.contiguous()
    topk_weights, addresses = _native.fp32(topk_weights), addresses.contiguous()
    step = max(1, WORKSPACE_BYTES // (4 * top_k * (hidden + width)))
    activations, given = _native.DTYPES[hidden_TD.dtype], byref(Experts.of(addresses, width, dtype, kind))
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        _native.call(
            "dsm_experts",
            activations,
            hidden_TD.data_ptr() + start * hidden * hidden_TD.itemsize,
            count,
            hidden,
            topk_indices.data_ptr() + start * top_k * 8,
            topk_weights.data_ptr() + start * top_k * 4,
            top_k,
            given,
            None if sums_TD is None else sums_TD.data_ptr() + start * hidden * 4,
            None if out_TD is None else out_TD.data_ptr() + start * hidden * out_TD.itemsize,
        )


def check_groups(kind: str, *columns: int) -> None:
    """Refuse rows of four-bit codes that are not whole groups."""
    group = KINDS[kind.removesuffix(NESTED)].group if kind in FOUR_BIT else 1
    if kind not in FOUR_BIT or any(size % group for size in columns):
        raise ValueError(f"experts: found {kind} rows of {columns}, wanted whole groups of one of {list(FOUR_BIT)}")


def _routed(hidden_TD, topk_indices, topk_weights, addresses, width, dtype, kind=None) -> torch.Tensor:
    out_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype)
    _run(hidden_TD, topk_indices, topk_weights, addresses, width, dtype, kind, None, out_TD)
    return out_TD


# As `accumulate`, from nothing, in the dtype of the activations.
routed = define(
    "routed_experts(Tensor hidden, Tensor indices, Tensor weights, Tensor addresses, int width, ScalarType dtype,"
    " str? kind=None) -> Tensor",
    _routed,
    lambda hidden, *_: hidden.new_empty(hidden.shape),
)


def run_low_rank(
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    addresses: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    kind: str | None,
    gate_up: tuple[torch.Tensor, torch.Tensor, float] | None,
    down: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """As `routed`, with what an adapter adds to gate and up, and to down.

    Args:
        gate_up, down: bf16 A ``[E, r, inputs]``, B turned ``[E, r, outputs]``, and the scale.

    Raises:
        ValueError: the matrices of the adapter are not those of the experts.
    """
    (tokens, hidden), experts = hidden_TD.shape, len(addresses)
    for name, pair, inputs, outputs in (("gate_up", gate_up, hidden, 2 * width), ("down", down, width, hidden)):
        for matrix, size in zip(() if pair is None else pair[:2], (inputs, outputs), strict=False):
            rank = pair[0].shape[1]
            if (
                matrix.shape != (experts, rank, size)
                or matrix.dtype != torch.bfloat16
                or not (matrix.is_contiguous() and matrix.is_cpu)
            ):
                wanted = f"{[experts, rank, size]} in bf16"
                raise ValueError(f"experts: found {_native.describe(matrix)} for {name}, wanted contiguous {wanted}")
    out_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
    hidden_TD, topk_indices = hidden_TD.contiguous(), topk_indices.contiguous()
    topk_weights, addresses = _native.fp32(topk_weights), addresses.contiguous()
    structs = [LowRank() if pair is None else LowRank.of(*pair) for pair in (gate_up, down)]
    pointers = byref(Experts.of(addresses, width, dtype, kind)), *map(byref, structs)
    top_k = topk_indices.shape[1]
    # as in `_run`, and for A a token's x and its SwiGLU outputs once more
    step = max(1, WORKSPACE_BYTES // (4 * (top_k * (hidden + 2 * width) + hidden)))
    for start in range(0, tokens, step):
        x, indices, weights, out = (t[start : start + step] for t in (hidden_TD, topk_indices, topk_weights, out_TD))
        _native.call(
            "dsm_experts_low_rank",
            *(_native.DTYPES[x.dtype], x.data_ptr(), len(x), hidden, indices.data_ptr(), weights.data_ptr(), top_k),
            *(*pointers, out.data_ptr()),
        )
    return out_TD


def _check(name: str, weight: torch.Tensor, wanted: tuple[int, ...], scale: torch.Tensor | None, dtype) -> None:
    """Refuse a ``weight`` that is not ``[..., N, K]`` as wanted, or whose scales do not fit it."""
    if weight.dtype != dtype or dtype not in WEIGHTS or weight.shape != wanted:
        wanted = f"{list(wanted)} in {dtype if dtype in WEIGHTS else ' or '.join(map(str, WEIGHTS))}"
        raise ValueError(f"experts: found {name} {_native.describe(weight)}, wanted {wanted}")
    if dtype == torch.float8_e4m3fn:
        halves = 2 if name == "gate_up" else 1  # which have blocks of their own
        blocks = (*wanted[:-2], halves * -(-wanted[-2] // halves // 128), -(-wanted[-1] // 128))
        if scale is None or scale.shape != blocks:
            found = "none" if scale is None else list(scale.shape)
            raise ValueError(f"experts: found scales of {name} {found}, wanted {list(blocks)}")


def addresses_of(gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    """``[E, 3, 2]``, as `accumulate` takes them, of stacks that are contiguous, with scales in fp32 or ``None``.

    Raises:
        ValueError: FP8 codes without scales.
    """
    if down.dtype == torch.float8_e4m3fn and (gate_up_scale is None or down_scale is None):
        raise ValueError("experts: found stacks of FP8 codes without scales, wanted scales of both")
    sizes, bases = [], []
    for stack in (gate_up, gate_up_scale, down, down_scale):
        sizes.append(0 if stack is None else stack.nbytes)
        bases.append(0 if stack is None else stack.data_ptr())
    bases = np.array((bases[:2], bases[:2], bases[2:]))  # numpy's small operations take a tenth of torch's time
    return torch.from_numpy(_offsets(len(down), *sizes) + bases)


@lru_cache(maxsize=64)
def _offsets(experts: int, gate_up: int, gate_up_scale: int, down: int, down_scale: int) -> np.ndarray:
    """Where each matrix begins in stacks of these sizes in bytes: ``[E, 3, 2]``, of codes and scales of gate, up and down."""
    index = np.arange(experts)[:, None]
    sizes = np.array((gate_up, gate_up_scale)) // max(experts, 1)
    gate = index * sizes
    return np.stack((gate, gate + sizes // 2, index * (np.array((down, down_scale)) // max(experts, 1))), axis=1)


def check_stacks(hidden: int, gate_up, down, gate_up_scale=None, down_scale=None) -> tuple[torch.Tensor | None, ...]:
    """Stacks as C reads them: contiguous, with scales in fp32.

    Raises:
        ValueError: they do not fit each other or ``hidden``.
    """
    experts, width = len(down), down.shape[-1]
    _check("gate_up", gate_up, (experts, 2 * width, hidden), gate_up_scale, gate_up.dtype)
    _check("down", down, (experts, hidden, width), down_scale, gate_up.dtype)
    scales = (None if scale is None else _native.fp32(scale) for scale in (gate_up_scale, down_scale))
    return gate_up.contiguous(), down.contiguous(), *scales


def _stacked(hidden_TD, topk_indices, topk_weights, gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    stacks = check_stacks(hidden_TD.shape[-1], gate_up, down, gate_up_scale, down_scale)
    return _routed(hidden_TD, topk_indices, topk_weights, addresses_of(*stacks), down.shape[-1], down.dtype)


# As `routed`, for gate_up [E, 2I, D] and down [E, D, I]; FP8 scales are stacked alike, gate's rows before up's.
stacked = define(
    "stacked_experts(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor? gate_up_scale, Tensor? down_scale) -> Tensor",
    _stacked,
    lambda hidden, *_: hidden.new_empty(hidden.shape),
)


def run(hidden_TD: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor, weights) -> torch.Tensor:
    """As `routed` or `stacked`, by what the `operands.Operands` are."""
    if weights.addresses is None:
        return stacked(hidden_TD, topk_indices, topk_weights, *weights.stacks)
    return routed(hidden_TD, topk_indices, topk_weights, weights.addresses, weights.width, weights.dtype, weights.kind)


def _swiglu(x, gate, up, down, gate_scale, up_scale, down_scale) -> torch.Tensor:
    hidden, width = x.shape[-1], gate.shape[0]
    matrices = []
    for name, weight, scale, shape in (
        ("gate", gate, gate_scale, (width, hidden)),
        ("up", up, up_scale, (width, hidden)),
        ("down", down, down_scale, (hidden, width)),
    ):
        _check(name, weight, shape, scale, gate.dtype)
        matrices.append((weight.contiguous(), None if scale is None else _native.fp32(scale)))
    addresses = torch.tensor([[w.data_ptr(), 0 if s is None else s.data_ptr()] for w, s in matrices])
    return _only_expert(x, addresses, width, gate.dtype)


def _only_expert(x: torch.Tensor, addresses: torch.Tensor, width: int, dtype, kind: str | None = None) -> torch.Tensor:
    """``x [..., D]`` through one expert, by the addresses ``[3, 2]`` of its codes and scales."""
    rows = x.reshape(-1, x.shape[-1])
    indices, weights = torch.zeros((len(rows), 1), dtype=torch.int64), torch.ones((len(rows), 1))
    return _routed(rows, indices, weights, addresses[None], width, dtype, kind).view(x.shape)


# down(silu(gate(x)) · up(x)) for x [..., D]: one expert that every token goes to.
swiglu = define(
    "swiglu(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_scale, Tensor? up_scale, Tensor? down_scale)"
    " -> Tensor",
    _swiglu,
    lambda x, *_: x.new_empty(x.shape),
)


def _swiglu_four_bit(
    x: torch.Tensor, codes: list[torch.Tensor], scales: list[torch.Tensor], kind: str
) -> torch.Tensor:
    """
    Args:
        codes: of gate, up and down.
        scales: `four_bit.cpu.parts_of` the scales of gate, then of up, then of down.
    """
    parts, hidden = len(scales) // 3, x.shape[-1]
    found = [
        four_bit.matrix("swiglu", kind, matrix, four_bit.scales_of(scales[i * parts : (i + 1) * parts]))
        for i, matrix in enumerate(codes)
    ]
    gate, up, down = (matrix for matrix, _ in found)
    shapes = [(matrix.rows, matrix.cols) for matrix in (gate, up, down)]
    if shapes != [(gate.rows, hidden), (gate.rows, hidden), (hidden, gate.rows)]:
        raise ValueError(f"swiglu: found gate, up and down of {shapes}, wanted ones that fit {hidden} inputs")
    addresses = torch.tensor([[matrix.data, matrix.scale] for matrix in (gate, up, down)])
    return _only_expert(x, addresses, gate.rows, codes[0].dtype, kind if parts == 1 else kind + NESTED)


# As `swiglu`, of codes of four bits, all of one kind.
swiglu_four_bit = define(
    "swiglu_four_bit(Tensor x, Tensor[] codes, Tensor[] scales, str kind) -> Tensor",
    _swiglu_four_bit,
    lambda x, *_: x.new_empty(x.shape),
)
