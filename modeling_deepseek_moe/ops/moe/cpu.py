"""Router, routed experts and shared experts of a few tokens on the CPU engine, in one call."""

import ctypes

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import EXPORTING
from modeling_deepseek_moe.ops._library import define

FEW_TOKENS = 8
WEIGHTS = (torch.float8_e4m3fn, torch.bfloat16)
MOST_EXPERTS = 4096


def refuses(x: torch.Tensor, gate: torch.Tensor) -> str | None:
    """Why the engine should not run the layer; ``None`` if it should, where `experts.cpu` does not refuse its weights."""
    if torch.compiler.is_exporting():
        return EXPORTING
    if x.dtype not in (torch.bfloat16, torch.float32) or torch.is_autocast_enabled("cpu"):
        return f"takes bf16 or fp32 outside of autocast, found {x.dtype}"
    if x.numel() > FEW_TOKENS * x.shape[-1]:
        return f"is for up to {FEW_TOKENS} tokens, found {x.numel() // x.shape[-1]}"
    if gate.dtype != torch.bfloat16 or not gate.is_contiguous() or len(gate) > MOST_EXPERTS:
        return f"takes a router in bf16, of up to {MOST_EXPERTS} experts, found {_native.describe(gate)}"
    if torch.is_grad_enabled() and gate.requires_grad:
        return "computes no gradients"
    return _native.refusal()


def _moe(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    routing: list[int],
    factor: float,
    addresses: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    shared: list[torch.Tensor],
    scales: list[torch.Tensor],
) -> torch.Tensor:
    """
    Args:
        x: ``[..., D]``, few tokens.
        gate: the router ``[E, D]`` in bf16; ``bias [E]`` in fp32.
        routing: groups, kept groups, top-k, and whether by softmax, by the best two of a group, and normalised.
        addresses, width, dtype: of the routed experts, see `experts.cpu.accumulate`.
        shared, scales: gate, up and down of the shared experts, as one wide expert; scales if they are FP8.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    experts, hidden = gate.shape
    groups, kept, top_k, _, best_two, _ = routing
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
        and groups >= 1
        and experts % groups == 0
        and 1 <= kept <= groups
        and 1 <= top_k <= experts // groups * kept
        and not (best_two and groups > 1 and experts < 2 * groups)
    )
    if not fits:
        found = ", ".join(map(_native.describe, (x, gate, addresses, *shared, *scales)))
        raise ValueError(f"moe: found tensors that do not fit each other or the routing {routing}: {found}")
    if not x.numel():
        return x.new_empty(x.shape)
    x, gate, addresses = x.contiguous(), gate.contiguous(), addresses.contiguous()
    bias = None if bias is None else bias.contiguous()
    shared = [weight.contiguous() for weight in shared]
    scales = [_native.fp32(scale) for scale in scales]
    table = [0] * 6
    for place, weight in enumerate(shared):
        table[2 * place : 2 * place + 2] = weight.data_ptr(), scales[place].data_ptr() if scales else 0
    kind = _native.DTYPES[shared[0].dtype] if shared else 0
    dims = (x.numel() // hidden, hidden, width, experts, *routing, _native.DTYPES[dtype], wide, kind)
    out = torch.empty_like(x)
    _native.call(
        "dsm_moe",
        *(_native.DTYPES[x.dtype], x.data_ptr(), (ctypes.c_int64 * 13)(*dims), gate.data_ptr()),
        *(_native.pointer(bias), factor, addresses.data_ptr(), (ctypes.c_int64 * 6)(*table), out.data_ptr()),
    )
    return out


moe = define(
    "moe(Tensor x, Tensor gate, Tensor? bias, int[] routing, float factor, Tensor addresses, int width, "
    "ScalarType dtype, Tensor[] shared, Tensor[] scales) -> Tensor",
    _moe,
    lambda x, *_: x.new_empty(x.shape),
)
