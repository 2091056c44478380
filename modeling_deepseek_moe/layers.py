"""The small layers: linear, RMSNorm, SwiGLU, and the rule that some tensors keep their dtype."""

from typing import ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from modeling_deepseek_moe.ops import block_fp8, experts
from modeling_deepseek_moe.ops._dispatch import CPU, may_use
from modeling_deepseek_moe.ops.linear import linear
from modeling_deepseek_moe.ops.rms_norm import rms_norm


def is_hooked(module: nn.Module) -> bool:
    """Whether something happens when the module is called besides its ``forward``."""
    # accelerate's hook is looked for where it is kept: `hasattr` takes a microsecond to find nothing, for each module and token
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__)


class KeepsDtype(nn.Module):
    """A module some of whose tensors move between devices but are never cast by ``.to(dtype)`` and its kin.

    FP8 codes lose their meaning when cast, and scales and router biases lose bits that matter.
    """

    dtype_kept: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn, recurse=True):
        kept = [getattr(self, name) for name in self.dtype_kept]

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if any(tensor is other for other in kept):
                probe = fn(tensor.new_empty(0))
                if probe.dtype != tensor.dtype:
                    return tensor.to(probe.device)
            return fn(tensor)

        return super()._apply(move, recurse)


class DeepseekLinear(nn.Linear):
    """``nn.Linear`` on this package's backends. FP8 weights (`Fp8Linear`) are a subclass with scales."""

    block: tuple[int, int] = block_fp8.BLOCK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def scale_inv(self) -> torch.Tensor | None:
        """The scales of an FP8 weight, ``None`` for any other."""
        return getattr(self, "weight_scale_inv", None)

    @property
    def is_bare(self) -> bool:
        """Whether reading the weight is as good as calling the module: no bias, and nothing hooked to the call."""
        return self.bias is None and not is_hooked(self)


class DeepseekRMSNorm(nn.Module):
    """``w · x / sqrt(mean(x²) + eps)`` over the last dimension, in fp32 whatever the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class DeepseekMLP(nn.Module):
    """SwiGLU: ``down(act(gate(x)) · up(x))``. Dense layers and shared experts."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = DeepseekLinear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = DeepseekLinear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = DeepseekLinear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if may_use(CPU, self.refusal(x)):
            parts = self.parts
            return experts.cpu.swiglu(x, *(p.weight for p in parts), *(p.scale_inv for p in parts))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj

    def refusal(self, x: torch.Tensor) -> str | None:
        """Why the CPU engine cannot run the layer in one call; ``None`` if it can."""
        parts = self.parts
        if not all(isinstance(part, DeepseekLinear) and part.is_bare for part in parts):
            return "needs plain linear layers, without adapters, biases or hooks"
        if len({part.weight.dtype for part in parts}) > 1 or any(part.block != block_fp8.BLOCK for part in parts):
            return f"needs weights of one dtype, in blocks of {block_fp8.BLOCK}"
        if torch.is_autocast_enabled("cpu"):
            return "does not run under autocast"
        return experts.cpu.refuses(x, self.act_fn, *(part.weight for part in parts))
