"""Gradients of routed experts that would be averaged twice: refused in the backward pass, before an optimizer sees one.

Under FSDP2 × EP an expert that lies on one rank only (``ep_size`` is ``fsdp_size * tp_size``) has its gradient divided by the number of
batches, where torch 2.13 copies it; in other dtypes than fp32 and bf16 torch divides it once more, so as to stay in range.
"""

from functools import partial

import torch
from torch import nn
from transformers.distributed import DistributedConfig

from modeling_deepseek_moe.moe.experts import DeepseekExperts

AVERAGED_ONCE = (torch.float32, torch.bfloat16)


def refuse_averaging_twice(model: nn.Module, asked: DistributedConfig) -> None:
    """Have the experts of a divided model raise a ValueError, on all ranks, as soon as a gradient that would be wrong reaches them."""
    # with fsdp_mixed_precision gradients are reduced in fp32
    if asked.ep_size == 1 or asked.efsdp_size > 1 or asked.dp_size == 1 or asked.fsdp_mixed_precision:
        return
    for name, module in model.named_modules():
        if isinstance(module, DeepseekExperts):
            module.register_forward_hook(partial(_watch, name, asked.fsdp_size))


def _watch(name: str, ranks: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    dtypes = {p.dtype for p in module.parameters() if p.requires_grad and p.dtype not in AVERAGED_ONCE}
    if output.requires_grad and dtypes:
        output.register_hook(
            partial(_refuse, f"{name}: found weights of {dtypes.pop()} to train, each on one of {ranks} ranks")
        )


def _refuse(found: str, gradient: torch.Tensor) -> None:
    raise ValueError(
        f"{found}, whose gradients torch divides by the number of batches twice; wanted float32 or bfloat16, "
        "fsdp_mixed_precision=True, or an ep_size below fsdp_size"
    )
