"""The torch operators of this package, ``torch.ops.deepseek_moe.*``: what `torch.compile` sees of the CPU engine."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("deepseek_moe", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register a CPU operator and its shape function, and return it.

    `Library.impl` costs half the call of `torch.library.custom_op`. There is no autograd formula: callers that need
    gradients wrap the operator.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"deepseek_moe::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.deepseek_moe, name).default
