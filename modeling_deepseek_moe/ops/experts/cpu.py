"""Routed experts and SwiGLU layers on the CPU engine, a layer in one call.

Legend: T tokens, E experts, K experts per token, D hidden size, I expert width.
"""

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define

WEIGHTS = (torch.float8_e4m3fn, torch.bfloat16)
# Packed inputs and SwiGLU outputs of one call; more tokens are computed a part at a time.
WORKSPACE_BYTES = 256 << 20


def refuses(x: torch.Tensor, act_fn: torch.nn.Module, *weights: torch.Tensor) -> str | None:
    """Why the engine cannot run SwiGLU layers with these activations and weights; ``None`` if it can."""
    reason = _native.refuses_activations(x)
    if reason is not None:
        return reason
    if not isinstance(act_fn, torch.nn.SiLU) and type(act_fn).__name__ != "SiLUActivation":
        return f"has silu for its activation function, found {type(act_fn).__name__}"
    for weight in weights:
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            return f"needs plain tensors, found {type(weight).__name__}"
        if weight.dtype not in WEIGHTS:
            return f"takes weights in {', '.join(str(dtype) for dtype in WEIGHTS)}, found {weight.dtype}"
        if weight.device.type != "cpu" or not weight.is_contiguous():
            return f"needs contiguous weights on the CPU, found {weight.device}, strides {weight.stride()}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        return "computes no gradients"
    return None


def accumulate(
    out_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    addresses: torch.Tensor,
    width: int,
    dtype: torch.dtype,
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
    """
    tokens, hidden = hidden_TD.shape
    top_k = topk_indices.shape[1]
    hidden_TD, topk_indices = hidden_TD.contiguous(), topk_indices.contiguous()
    topk_weights, addresses = topk_weights.float().contiguous(), addresses.contiguous()
    assert out_TD.dtype == torch.float32 and out_TD.is_contiguous() and topk_indices.dtype == torch.int64
    step = max(1, WORKSPACE_BYTES // (4 * top_k * (hidden + width)))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        x = hidden_TD[part]
        _native.call(
            "dsm_experts",
            *(_native.DTYPES[x.dtype], x.data_ptr(), len(x), hidden, width),
            *(topk_indices[part].data_ptr(), topk_weights[part].data_ptr(), top_k),
            *(addresses.data_ptr(), len(addresses), _native.DTYPES[dtype], out_TD[part].data_ptr()),
        )


def _routed(hidden_TD, topk_indices, topk_weights, addresses, width: int, dtype: torch.dtype) -> torch.Tensor:
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
    accumulate(out_TD, hidden_TD, topk_indices, topk_weights, addresses, width, dtype)
    return out_TD.to(hidden_TD.dtype)


# As `accumulate`, from nothing, in the dtype of the activations.
routed = define(
    "routed_experts(Tensor hidden, Tensor indices, Tensor weights, Tensor addresses, int width, ScalarType dtype)"
    " -> Tensor",
    _routed,
    lambda hidden, indices, weights, addresses, width, dtype: torch.empty_like(hidden),
)


def _stacked(hidden_TD, topk_indices, topk_weights, gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    experts, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up_bytes, down_bytes = gate_up[0].nbytes, down[0].nbytes
    index = torch.arange(experts)
    addresses = torch.zeros((experts, 3, 2), dtype=torch.int64)
    for place, tensor, size, half in ((0, gate_up, gate_up_bytes, 0), (1, gate_up, gate_up_bytes, 1), (2, down, 0, 0)):
        addresses[:, place, 0] = tensor.data_ptr() + index * (size or down_bytes) + half * (size // 2)
    if gate_up_scale is not None:
        for place, scale, half in ((0, gate_up_scale, 0), (1, gate_up_scale, 1), (2, down_scale, 0)):
            size = scale[0].nbytes
            addresses[:, place, 1] = scale.data_ptr() + index * size + half * (size // 2)
    return _routed(hidden_TD, topk_indices, topk_weights, addresses, width, gate_up.dtype)


# As `routed`, for gate_up [E, 2I, D] and down [E, D, I]; FP8 scales are stacked alike, gate's rows before up's.
stacked = define(
    "stacked_experts(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor? gate_up_scale, Tensor? down_scale) -> Tensor",
    _stacked,
    lambda hidden, *_: torch.empty_like(hidden),
)


def _swiglu(x, gate, up, down, gate_scale, up_scale, down_scale) -> torch.Tensor:
    matrices = ((gate, gate_scale), (up, up_scale), (down, down_scale))
    addresses = torch.tensor([[w.data_ptr(), 0 if s is None else s.data_ptr()] for w, s in matrices])
    rows = x.reshape(-1, x.shape[-1])
    indices, weights = torch.zeros((len(rows), 1), dtype=torch.int64), torch.ones((len(rows), 1))
    return _routed(rows, indices, weights, addresses[None], gate.shape[0], gate.dtype).view(x.shape)


# down(silu(gate(x)) · up(x)) for x [..., D]: one expert that every token goes to.
swiglu = define(
    "swiglu(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_scale, Tensor? up_scale, Tensor? down_scale)"
    " -> Tensor",
    _swiglu,
    lambda x, *_: torch.empty_like(x),
)
