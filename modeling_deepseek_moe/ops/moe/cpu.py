"""Router, routed experts and shared experts of a few tokens on the CPU engine, in one call."""

from ctypes import addressof, byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import Expert, Experts, Matrix, Moe, Routing
from modeling_deepseek_moe.ops.experts.cpu import addresses_of, check_stacks
from modeling_deepseek_moe.ops.routing.cpu import MOST_EXPERTS, SCHEMA, chooses

WEIGHTS = (torch.float8_e4m3fn, torch.bfloat16)
MOST_TOKENS = 16  # DSM_STEP_TOKENS


def _moe(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    top_k: int,
    softmax: bool,
    group_score_top2: bool,
    norm_topk_prob: bool,
    scaling_factor: float,
    addresses: torch.Tensor | None,
    stacks: list[torch.Tensor],
    width: int,
    dtype: torch.dtype,
    shared: list[torch.Tensor],
    scales: list[torch.Tensor],
) -> torch.Tensor:
    """
    Args:
        x: ``[..., D]``, few tokens.
        gate: the router ``[E, D]`` in bf16; ``bias [E]`` in fp32.
        n_group, ...: how the router chooses, as `routing.Routing` has it.
        addresses, width, dtype: of the routed experts, see `experts.cpu.accumulate`.
        stacks: in place of ``addresses``: gate and up, down, and the scales of both if they are FP8.
        shared, scales: gate, up and down of the shared experts, as one wide expert; scales if they are FP8.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    experts, hidden = gate.shape
    if addresses is None:
        stacks = check_stacks(hidden, *stacks)  # kept until the call is over
        addresses, width, dtype = addresses_of(*stacks), stacks[1].shape[-1], stacks[1].dtype
    wide = shared[0].shape[0] if shared else 0
    _check(x, gate, bias, addresses, dtype, shared, scales)
    if not chooses(experts, n_group, topk_group, top_k, group_score_top2):
        found = f"{top_k} of {experts} experts in {topk_group} of {n_group} groups"
        raise ValueError(f"moe: found {found}, which do not fit each other")
    if not x.numel():
        return x.new_empty(x.shape)
    x, gate, addresses = x.contiguous(), gate.contiguous(), addresses.contiguous()
    bias = None if bias is None else bias.contiguous()
    shared = [weight.contiguous() for weight in shared]
    scales = [_native.fp32(scale) for scale in scales]
    how = Routing(n_group, topk_group, top_k, softmax, group_score_top2, norm_topk_prob, scaling_factor)
    own = Experts()
    if shared:
        entry = Expert()
        entry.gate, entry.up, entry.down = (weight.data_ptr() for weight in shared)
        if scales:
            entry.gate_scale, entry.up_scale, entry.down_scale = (scale.data_ptr() for scale in scales)
        own = Experts(addressof(entry), 1, wide, _native.DTYPES[shared[0].dtype])
    layer = Moe(Matrix.of(gate), _native.pointer(bias), how, Experts.of(addresses, width, dtype), own)
    out = torch.empty_like(x)
    _native.call(
        "dsm_moe",
        *(_native.DTYPES[x.dtype], x.data_ptr(), x.numel() // hidden, hidden, byref(layer), out.data_ptr()),
    )
    return out


def _check(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    addresses: torch.Tensor,
    dtype: torch.dtype,
    shared: list[torch.Tensor],
    scales: list[torch.Tensor],
) -> None:
    """Refuse tensors that do not fit each other, before C reads them by address."""
    experts, hidden = gate.shape
    wide = shared[0].shape[0] if shared else 0
    shapes = [(wide, hidden), (wide, hidden), (hidden, wide)][: len(shared)]
    fits = (
        x.shape[-1] == hidden
        and x.dtype in (torch.bfloat16, torch.float32)
        and gate.dtype == torch.bfloat16
        and experts <= MOST_EXPERTS
        and (bias is None or (bias.shape == (experts,) and bias.dtype == torch.float32))
        and addresses.shape == (experts, 3, 2)
        and addresses.dtype == torch.int64
        and dtype in WEIGHTS
        and len(shared) in (0, 3)
        and [tuple(weight.shape) for weight in shared] == shapes
        and all(weight.dtype == shared[0].dtype in WEIGHTS for weight in shared)
        and len(scales) == (3 if shared and shared[0].dtype == torch.float8_e4m3fn else 0)
        and all(s.shape == tuple(-(-n // 128) for n in w.shape) for w, s in zip(shared, scales, strict=False))
        and x.numel() <= MOST_TOKENS * hidden
    )
    if not fits:
        found = ", ".join(map(_native.describe, (x, gate, addresses, *shared, *scales)))
        raise ValueError(f"moe: found tensors that do not fit each other: {found}")


moe = define(
    f"moe(Tensor x, Tensor gate, Tensor? bias, {SCHEMA}, Tensor? addresses, Tensor[] stacks, int width, "
    "ScalarType dtype, Tensor[] shared, Tensor[] scales) -> Tensor",
    _moe,
    lambda x, *_: x.new_empty(x.shape),
)
