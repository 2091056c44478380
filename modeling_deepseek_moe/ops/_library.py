"""The torch operators of this package, ``torch.ops.deepseek_moe.*``: what `torch.compile` sees of the CPU engine and of kernels."""

from collections.abc import Callable
from functools import wraps

import torch
from torch._subclasses.fake_tensor import FakeTensor

LIBRARY = torch.library.Library("deepseek_moe", "DEF")
PLAIN = (torch.Tensor, torch.nn.Parameter)
PLAIN_OR_FAKE = (*PLAIN, FakeTensor)  # and those that have shapes alone


def define(schema: str, implementation: Callable | None, fake: Callable, cuda: Callable | None = None) -> Callable:
    """Register an operator and its shape function, and return a function that calls it; ``operator`` is its attribute.

    Args:
        implementation: on a CPU; ``None``: it has none.
        cuda: on CUDA; ``None``: it has none. An attribute of the function too.

    An operator's way through torch's dispatcher takes 5 µs, of the 10 to 20 that a small layer takes: outside tracing
    and profiling the function calls ``implementation`` itself. (`torch.library.custom_op` would take twice as long.) There is no
    autograd formula: callers that need gradients wrap the function.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for function, key in ((implementation, "CPU"), (cuda, "CUDA")):
        if function is not None:
            LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"deepseek_moe::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.deepseek_moe, name).default

    @wraps(implementation or cuda)
    def call(*arguments, **named):
        if implementation is None or named or needs_dispatcher(arguments):
            return operator(*arguments, **named)
        return implementation(*arguments)

    setattr(call, "operator", operator)  # noqa: B010 - a function's own attribute
    setattr(call, "cuda", cuda)  # noqa: B010
    return call


def needs_dispatcher(arguments: tuple) -> bool:
    """Whether a call has to be an operator's: for a compiler, a tracer, a profiler, a mode, a subclass or another device."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if (
        torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()
    ):  # torch has no public name for either
        return True
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and (type(argument) not in PLAIN or not argument.is_cpu):
            return True
    return False
