"""A second torch device written in Python, ``fake:0``: its tensors keep their values in CPU tensors.

It computes what the CPU computes, to the bit, and refuses what a real device refuses: an operation on tensors of two devices.
It is torch's PrivateUse1 device, of which a process has one, so tests that use it run in a process of their own.
"""

import gc
from functools import partial

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"
TOTAL = 1 << 30  # bytes, as the device says; `Memory.limit` is what it allows


class Memory:
    """Of the device: what it may hold, how many allocations are left to it and were made, and the bytes that crossed each way."""

    limit: int | None = None
    left: int | None = None
    allocations = to_device = from_device = 0

    @classmethod
    def used(cls) -> int:
        gc.collect()
        alive = [value.values.untyped_storage() for value in gc.get_objects() if type(value) is FakeTensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())

    @classmethod
    def allocate(cls, values: torch.Tensor) -> torch.Tensor:
        if cls.limit is not None and cls.used() + values.nbytes > cls.limit:
            raise torch.OutOfMemoryError(f"fake:0 holds {cls.limit:,} bytes")
        if values.nbytes and cls.left == 0:
            raise torch.OutOfMemoryError(f"fake:0 has no {values.nbytes:,} bytes")
        if values.nbytes:
            cls.left = None if cls.left is None else cls.left - 1
            cls.allocations += 1
        return FakeTensor(values)


class FakeTensor(torch.Tensor):
    """A tensor on the device; ``values`` are on the CPU, and share memory where views do."""

    values: torch.Tensor
    __module__ = "torch"  # as a device's tensors are torch's own
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        made = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
        made.__class__ = cls
        return made

    def __init__(self, values: torch.Tensor):
        self.values = values


class BackendModule(_DummyBackendModule):
    """What ``torch.fake`` is."""

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def mem_get_info(device) -> tuple[int, int]:
        return TOTAL - Memory.used(), TOTAL

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


def on_device(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def to_values(value):
    """A tensor of the device, or the device itself, as the CPU has it."""
    if on_device(value):
        return value.values
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def run(op, *args, **kwargs):
    """Any operation on tensors of the device, by the CPU's."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
        raise RuntimeError(f"{op}: Expected all tensors to be on the same device, found {[t.device for t in tensors]}")
    if op in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        op = torch.ops.aten.reshape.default  # strides on the device are those of contiguous tensors
    if op is torch.ops.aten.histc.default and not args[0].is_floating_point():  # which a CPU has for floats alone
        return run(op, args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    found = op(*tree_map(to_values, args), **tree_map(to_values, kwargs))
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments)
    held = {id(tensor.values): tensor for tensor in tensors if writes and on_device(tensor)}

    def back(value):
        if not isinstance(value, torch.Tensor):
            return value
        return held[id(value)] if id(value) in held else FakeTensor(value)

    return tree_map(back, found)


def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Memory.allocate(torch.empty(size, dtype=dtype, device="cpu"))


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Memory.allocate(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def copy_from(source, target, non_blocking=False):
    if on_device(target) and not on_device(source):
        Memory.to_device += source.nbytes
    elif on_device(source) and not on_device(target):
        Memory.from_device += source.nbytes
    to_values(target).copy_(to_values(source))
    return target


def make(op, *args, **kwargs):
    """A factory whose own code resizes what it makes."""
    return FakeTensor(op(*args, **kwargs | {"device": "cpu"}))


def register() -> list[torch.library.Library]:
    """Make the device; it lasts as long as what is returned."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=BackendModule())
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(run, "PrivateUse1")
    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda tensor: tensor.values.item(), "PrivateUse1")
    for name in ("eye", "eye.m", "arange", "arange.start", "arange.start_step"):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, partial(make, op), "PrivateUse1")
    for name in (
        "linear",
        "matmul",
        "scaled_dot_product_attention",
    ):  # else made of parts, with other bits than the CPU's
        aten.impl(name, partial(run, getattr(torch.ops.aten, name).default), "PrivateUse1")
    # before autograd, which copies views of another dtype without what Python knows of them
    aten.impl("view.dtype", partial(run, torch.ops.aten.view.dtype), "AutogradPrivateUse1")
    # Views: torch's own would be made of the device tensor's strides, which are not those of its values.
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            op = getattr(packet, overload)
            returns = op._schema.returns
            is_view = (
                torch._C._dispatch_has_kernel(op.name())
                and returns
                and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
            )
            key = torch._C.DispatchKey.CompositeImplicitAutograd
            if (is_view or name == "_unsafe_view") and not torch._C._dispatch_has_kernel_for_dispatch_key(
                op.name(), key
            ):
                aten.impl(op.name().removeprefix("aten::"), partial(run, op), "PrivateUse1")
    return [rest, aten]
