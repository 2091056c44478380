"""DeepGEMM's grouped product of codes, where the machine has it and it is faster for a layer of experts: see `_trials`.

Rows lie expert by expert, each expert's padded to whole segments, and every row names its expert. How many there are is known
on the device alone: there is room for any routing.

Legend: E experts, S slots, K experts per token, R rows of all segments.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from modeling_deepseek_moe.ops._dispatch import DEEP_GEMM
from modeling_deepseek_moe.ops._libraries import Call, current, function_of, lacks, refusal
from modeling_deepseek_moe.ops._trials import Trial, random, trials
from modeling_deepseek_moe.ops.block_fp8 import reference

CALL = Call("m_grouped_fp8_gemm_nt_contiguous", ("a", "b", "d"))
SEGMENT = (
    128  # rows; what `get_mk_alignment_for_contiguous_layout` is unless somebody sets it, and a trial would see that
)
BLOCK = 128
TOLERANCE = 4e-3  # twice what rounding to bf16 may take
NONE = -1  # of rows that are no expert's


class Segments(NamedTuple):
    """``owners [R]``: each row's expert. ``slots [R]``: the slot that it serves, S if none. ``rows [S]``: the row of each slot."""

    owners: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor


def segments(slots: torch.Tensor, ends: torch.Tensor) -> Segments:
    """Of slots sorted by expert ``[S]`` and the end of each expert's ``[E]``; what is left over is no expert's. Waits for nothing."""
    count, experts = len(slots), len(ends)
    total = (-(-count // SEGMENT) + experts) * SEGMENT
    ends = ends.long()
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    last = ((ends - starts + SEGMENT - 1) // SEGMENT * SEGMENT).cumsum(0)
    row = torch.arange(total, device=slots.device)
    owner = torch.searchsorted(last, row, right=True)
    known = owner.clamp_max(experts - 1)
    place = starts[known] + row - torch.cat((last.new_zeros(1), last[:-1]))[known]
    serves = (owner < experts) & (place < ends[known])
    slot = torch.where(serves, slots[torch.where(serves, place, 0)].long(), count)
    rows = row.new_full((count + 1,), total - 1).scatter_(0, slot, row)[:count]
    return Segments(torch.where(owner < experts, owner, NONE).int(), slot, rows)


def unsupported(card: int, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Why it cannot compute such experts; ``None`` if it may be tried."""
    reason = refusal(DEEP_GEMM, card)
    if reason is None and (down.shape[1] % BLOCK or down.shape[2] % BLOCK):
        reason = f"wants experts of whole blocks of {BLOCK}, found {list(down.shape[1:])}"
    return reason or lacks(DEEP_GEMM, CALL)


def unsuitable(
    hidden: torch.Tensor, shape: tuple[int, ...], theirs: Callable[[], object], own: Callable[[], object]
) -> str | None:
    """Why it is not taken; ``None`` if it is. The first call for such a shape tries it out.

    Args:
        shape: what a verdict holds for.
        theirs, own: the whole layer, either way.
    """

    def make() -> Trial:
        stack = [
            reference.quantize(random(256, 256, like=hidden, seed=seed), (BLOCK, BLOCK), False) for seed in range(3)
        ]
        b, b_scale = torch.stack([codes for codes, _ in stack]), torch.stack([scale for _, scale in stack])
        # blocks and experts that differ much: one taken for another would be seen
        b_scale = b_scale * (1 + torch.arange(b_scale.numel(), device=hidden.device).view(b_scale.shape))
        a, a_scale = reference.quantize_tiles(random(3 * SEGMENT, 256, like=hidden, seed=3), False)
        owners = torch.tensor([0, 2, NONE], device=hidden.device).repeat_interleave(SEGMENT).int()
        wanted = [
            reference.gemm(a[owners == e], a_scale[owners == e], b[e], b_scale[e].repeat_interleave(BLOCK, 0))
            for e in (0, 2)
        ]
        return Trial(
            lambda: [product(a, a_scale, b, b_scale, owners)[: 2 * SEGMENT]],
            lambda: [torch.cat(wanted)],
            TOLERANCE,
            theirs,
            own,
        )

    return trials().reason(DEEP_GEMM, "FP8 experts", hidden, shape, make)


def product(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, owners: torch.Tensor
) -> torch.Tensor:
    """Rows ``[R, K]`` times their experts' ``b [E, N, K]`` in bf16; rows of no expert are not written.

    Args:
        a_scale, b_scale: ``[R, K/128]`` and ``[E, N/128, K/128]``, fp32.
        owners: ``[R]`` int32, whole segments of each expert's; -1 for none.
    """
    function = function_of(DEEP_GEMM, CALL)
    out = a.new_empty((len(a), b.shape[1]), dtype=torch.bfloat16)
    # scales of A one tile after another, where it would copy them otherwise; R is whole words of 16 bytes
    by_tile = a_scale.new_empty((a_scale.shape[1], len(a))).copy_(a_scale.t()).t()
    with current(a.device):
        function((a, by_tile), (b, b_scale.contiguous()), out, owners)
    return out
