"""Routed SwiGLU experts on a CUDA card, of weights as they are stored: three launches for few tokens, four for many.

Many rows of FP8 experts are quantised too on cards that multiply FP8 (SM89 and later), as the releases' recipe has it.

Nothing is read on the host, so a step with them can be captured in a CUDA graph. Legend: T tokens, K experts per token,
S = T·K slots, E experts, D hidden size, I expert width.
"""

from functools import cache
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import PLAIN_OR_FAKE, define
from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.experts.cpu import is_silu
from modeling_deepseek_moe.ops.experts.triton_products import Order, by_codes, capability_of, programs
from modeling_deepseek_moe.ops.four_bit.reference import KINDS

FP8, BF16 = "fp8", "bf16"
SORT_FROM = 32  # slots: from here on several are of one expert, whose weights are read once for them
MANY_ROWS = 16  # of an expert on average: from here on a program takes many rows
GROUPED_MM = (9, 10)  # generations that torch has grouped kernels for
NAN_CODE = 0x7F
Scales = TypeVar("Scales", torch.Tensor, torch.Tensor | None)
SLOT = "_finite_stacks"  # where a module says of which stacks it is known that all codes are numbers


def kind(weights) -> str | None:
    """The kernels' name of the format of `operands.Operands`; ``None``: they have none for it."""
    if weights.kind is not None:
        return weights.kind if weights.kind in KINDS else None
    return {torch.float8_e4m3fn: FP8, torch.bfloat16: BF16}.get(weights.dtype)


def refuses(
    module: nn.Module, weights, hidden_TD: torch.Tensor, topk_weights: torch.Tensor, with_gradients: bool = False
) -> str | None:
    """Why these experts cannot run on the card with such activations; ``None`` if they can.

    Args:
        module: a layer of experts, with ``act_fn``.
        weights: its `operands.Operands`; ``dtype`` may be what they are cast to.
        with_gradients: the caller sees to them, and gets what cannot be in a graph.
    """
    reason = _triton.refusal(hidden_TD.device)
    if reason is not None:
        return reason
    if hidden_TD.dtype != torch.bfloat16:
        return f"takes activations in torch.bfloat16, found {hidden_TD.dtype}"
    if kind(weights) is None:
        return f"has no kernels for experts in {weights.kind or weights.dtype}"
    if not weights.stacks:
        return "needs stacked experts on the card, found experts mapped from files"
    if needs_gradients(hidden_TD, topk_weights, *weights.stacks[:2]):
        if not with_gradients:
            return "computes no gradients"
        if torch.compiler.is_compiling():
            return "computes no gradients in graphs"
    if not is_silu(module.act_fn):
        return f"has silu for its activation function, found {type(module.act_fn).__name__}"
    return _refuses_stacks(weights, hidden_TD) or _refuses_nan(module, weights)


def needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def torch_is_faster(weights, hidden_TD: torch.Tensor, slots: int) -> bool:
    """Whether many rows of bf16 experts are left to `torch.nn.functional.grouped_mm`, which has a kernel of its own on such a card.

    On others it reads the routing on the host and multiplies expert by expert.
    """
    if kind(weights) != BF16 or slots < MANY_ROWS * len(weights.stacks[0]):
        return False
    return _triton.capability(hidden_TD.device) // 10 in GROUPED_MM


def _refuses_stacks(weights, hidden_TD: torch.Tensor) -> str | None:
    name = kind(weights)
    for stack in weights.stacks:
        if stack is None:
            continue
        if type(stack) not in PLAIN_OR_FAKE:
            return f"needs plain tensors, found {type(stack).__name__}"
        if stack.device != hidden_TD.device or not stack.is_contiguous() or stack.ndim != 3:
            found = f"{list(stack.shape)} on {stack.device}, strides {stack.stride()}"
            return f"needs contiguous stacks on {hidden_TD.device}, found {found}"
    if name == BF16:
        return None
    if weights.stacks[2] is None or weights.stacks[3] is None:
        return "needs stacks of codes with their scales, found none"
    whole = KINDS[name].group if name in KINDS else 4  # codes of an int32
    for size in (hidden_TD.shape[-1], weights.width):
        if size % whole:
            return f"takes rows of whole groups of {whole} codes, found rows of {size}"
    return None


def _refuses_nan(module: nn.Module, weights) -> str | None:
    """FP8 codes that are NaN, which the kernels read as ±480. Waits for the card, once for a module's stacks."""
    if kind(weights) != FP8 or torch.compiler.is_compiling() or isinstance(weights.stacks[0], FakeTensor):
        return None
    own = [(stack.data_ptr(), None if stack.is_inference() else stack._version) for stack in weights.stacks[:2]]
    known = module.__dict__.get(SLOT)
    if known is None or known[0] != own:
        known = module.__dict__[SLOT] = own, any(has_nan(stack) for stack in weights.stacks[:2])
    return "takes codes that are numbers, found NaN among the experts' FP8 codes" if known[1] else None


def has_nan(codes: torch.Tensor) -> bool:
    """Whether a stack of E4M3 codes ``[E, N, K]`` has one that is NaN; an expert at a time, without a copy of the stack."""
    raw = codes.view(torch.uint8)
    return any(bool((matrix & NAN_CODE).eq(NAN_CODE).any()) for matrix in raw)


@cache
def table_of(name: str, device: torch.device) -> torch.Tensor:
    """int32 ``[256]``: the two values, in bf16, of each byte of a four-bit format whose codes are looked up."""
    values = torch.tensor(KINDS[name].values, dtype=torch.float32).to(torch.bfloat16)
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack((high, low), dim=1).contiguous().view(torch.int32).flatten().to(device)


def experts(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    name: str,
) -> torch.Tensor:
    """``out_t = Σ_k weight_tk · down_k(silu(gate_k x_t) · up_k x_t)``, ``[T, D]`` in bf16.

    Args:
        indices, weights: ``[T, K]``; an index of E marks a slot that is served elsewhere.
        gate_up: ``[E, 2I, D]`` as stored; ``down``: ``[E, D, I]``.
        name: of the format, one of `KINDS`, ``"fp8"`` or ``"bf16"``.
    """
    slots, (tokens, size) = indices.numel(), hidden.shape
    out = torch.empty((tokens, size), dtype=hidden.dtype, device=hidden.device)
    if not slots:
        return out.zero_()
    y = slot_results(hidden, indices, weights, (gate_up, down, gate_up_scale, down_scale), name)
    grid = tokens, _triton.blocks(size, 256)
    kernel = _triton.kernels("experts").combine
    _triton.launch(
        kernel, grid, hidden.device, y, indices.contiguous(), out, len(down), size, TOP_K=indices.shape[1], BN=256
    )
    return out


def _way(slots: int, experts: int) -> str:
    """How slots are served: one a program, or sorted, with few or many rows of an expert."""
    if slots < SORT_FROM:
        return "slots"
    return "many" if slots >= MANY_ROWS * experts else "few"


def joins(name: str, slots: int) -> bool:
    """Whether shared experts of the same format are computed with this many slots: see `slot_results`."""
    return name in (FP8, BF16) and slots < SORT_FROM


def slot_results(
    hidden, indices, weights, stacks, name: str, shared: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """``weight_tk · down_k(silu(gate_k x_t) · up_k x_t)`` of every slot, ``[S, D]`` in fp32: see `experts`, which adds them up.

    What is served elsewhere is not written.

    Args:
        shared: gate, up and down of the shared experts, and the three's scales if they are FP8, where `joins` says so: their
            part for each token follows the slots, ``[S + T, D]``.
    """
    hidden, indices, weights = hidden.contiguous(), indices.contiguous(), weights.contiguous()
    device, slots, count = hidden.device, indices.numel(), len(stacks[0])
    way, card = _way(slots, count), capability_of(device)
    if name == FP8 and way == "many" and card >= _triton.FP8_CORES:
        return by_codes(hidden, indices, weights, *stacks)
    order = ends = indices
    if way != "slots":
        order, ends, _ = Order.of(indices, count)
    if name in KINDS and way != "many":
        return _by_groups(hidden, (indices, order, ends), weights, stacks, name, card, way != "slots")
    return _by_parts(hidden, (indices, order, ends), weights, stacks, name, card, way, shared or [])


def group_of(name: str) -> int:
    """Codes that share a scale."""
    return KINDS[name].group if name in KINDS else 128


def is_looked_up(name: str) -> bool:
    """Whether the kernels look a byte's two values up in `table_of`."""
    return name in KINDS and not KINDS[name].low_first


def decoder(name: str) -> str:
    """The ``KIND`` of kernels that decode part by part."""
    return "nf4" if is_looked_up(name) else name


def _constants(name: str, is_sorted: bool, count: int) -> dict:
    return {
        "GROUP": group_of(name),
        "SORTED": is_sorted,
        "EXPERTS": _triton.power_of_two(count) if is_sorted else 1,
    }


def _programs(slots: int, count: int, rows: int, is_sorted: bool) -> int:
    return programs(slots, count, rows) if is_sorted else slots


def _by_parts(
    hidden, routed, weights, stacks, name: str, card: int, way: str, shared: list[torch.Tensor]
) -> torch.Tensor:
    """`slot_results` of weights that are decoded part by part."""
    (gate_up, down, *scales), kernels, device = stacks, _triton.kernels("experts"), hidden.device
    (tokens, size), slots, (count, width) = hidden.shape, routed[0].numel(), (len(gate_up), gate_up.shape[1] // 2)
    codes, scales = _words(gate_up, down), [plain(scale) for scale in scales]
    table = table_of(name, device) if is_looked_up(name) else routed[0]
    more, shared_width = (tokens, shared[0].shape[0]) if shared else (0, 0)
    h = torch.empty((slots, width), dtype=torch.bfloat16, device=device)
    inner = torch.empty((more, shared_width), dtype=torch.bfloat16, device=device) if shared else None
    y = torch.empty((slots + more, size), dtype=torch.float32, device=device)
    gate, up, last = _words(*shared[:3]) if shared else (None, None, None)
    gate_s, up_s, last_s = shared[3:] if len(shared) > 3 else (None, None, None)
    constants = _constants(name, way != "slots", count) | {"KIND": decoder(name), "SHARED": bool(shared)}
    first = tiles(f"experts_gate_up_{'joined' if shared and name == BF16 else way}", card)
    second = tiles(f"experts_down_{way}", card)
    _triton.launch(
        kernels.gate_up,
        (_programs(slots, count, first.rows, way != "slots") + more, _triton.blocks(max(width, shared_width), first.columns)),
        device, hidden, *routed, codes[0], scales[0], table, h, count, width, size,
        gate, up, gate_s, up_s, inner, slots, shared_width,
        TOP_K=routed[0].shape[1], **constants, **first.constants(), warps=first.warps,
    )  # fmt: skip
    _triton.launch(
        kernels.down,
        (_programs(slots, count, second.rows, way != "slots") + more, _triton.blocks(size, second.columns)),
        device, h, *routed, weights, codes[1], scales[1], table, y, count, width, size,
        last, last_s, inner, slots, shared_width,
        **constants, **second.constants(), warps=second.warps,
    )  # fmt: skip
    return y


def _by_groups(hidden, routed, weights, stacks, name: str, card: int, is_sorted: bool) -> torch.Tensor:
    """`slot_results` of four-bit codes for few rows of an expert: see `_triton_groups`."""
    (gate_up, down, *scales), device = stacks, hidden.device
    kernels, table = _triton.kernels("experts", "triton_group_kernels"), _triton.words_of(KINDS[name].values, device)
    size, slots, (count, width) = hidden.shape[1], routed[0].numel(), (len(gate_up), gate_up.shape[1] // 2)
    codes, scales = _words(gate_up, down), [plain(scale) for scale in scales]
    h = torch.empty((slots, width), dtype=torch.bfloat16, device=device)
    y = torch.empty((slots, size), dtype=torch.float32, device=device)
    constants = _constants(name, is_sorted, count) | {"KIND": name}
    for kernel, columns, depth, arguments, own in (
        (
            kernels.gate_up,
            width,
            size,
            (hidden, *routed, codes[0], scales[0], table, h),
            {"TOP_K": routed[0].shape[1]},
        ),
        (kernels.down, size, width, (h, *routed, weights, codes[1], scales[1], table, y), {}),
    ):
        tiling = tiles(f"experts_{'gate_up' if own else 'down'}_groups_of_{constants['GROUP']}", card)
        grid = _programs(slots, count, tiling.rows, is_sorted), _triton.blocks(columns, tiling.columns)
        _triton.launch(
            kernel, grid, device, *arguments, count, width, size,
            WHOLE=depth % tiling.depth == 0, **own, **constants, **tiling.constants(), warps=tiling.warps,
        )  # fmt: skip
    return y


def _words(*stacks: torch.Tensor) -> list[torch.Tensor]:
    return [stack if stack.dtype == torch.bfloat16 else stack.view(torch.int32) for stack in stacks]


def plain(scales: Scales) -> Scales:
    """Exponents as bytes."""
    return scales.view(torch.uint8) if scales is not None and scales.itemsize == 1 else scales


routed = define(
    "experts_on_card(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor? gate_up_scale, Tensor? down_scale, str name) -> Tensor",
    None,
    lambda hidden, *_: hidden.new_empty(hidden.shape),
    cuda=experts,
)


def run(hidden_TD: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor, weights) -> torch.Tensor:
    """As `cpu.run`, on a card: of `operands.Operands` that `refuses` has nothing against."""
    name, (gate_up, down, *scales) = kind(weights), weights.stacks
    if name == BF16:
        gate_up, down = gate_up.to(torch.bfloat16), down.to(torch.bfloat16)
    return routed(hidden_TD, topk_indices, topk_weights, gate_up, down, *scales, name)
