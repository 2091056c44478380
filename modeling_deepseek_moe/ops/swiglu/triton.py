"""SwiGLU's activation on a GPU in one kernel."""

import torch

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._triton import blocks, kernels, launch

BLOCK = 1024


def unsupported_reason(gate: torch.Tensor, up: torch.Tensor) -> str | None:
    """Why the kernel cannot multiply them; ``None`` if it can."""
    if gate.shape != up.shape:
        return f"needs gate and up of one shape, found {list(gate.shape)} and {list(up.shape)}"
    return _triton.unsupported_reason(gate, up) or _triton.unsupported_floats(gate, up)


def _activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: found {list(gate.shape)} and {list(up.shape)}, wanted one shape")
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    launch(
        kernels("swiglu").activate, (blocks(out.numel(), BLOCK),), gate.device, gate, up, out, out.numel(), BLOCK=BLOCK
    )
    return out


# silu(gate) · up.
activate = define(
    "triton_swiglu(Tensor gate, Tensor up) -> Tensor",
    None,
    lambda gate, up: gate.new_empty(gate.shape),
    _activate,
)
