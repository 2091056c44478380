"""A model that is moved to an accelerator with memory of its own: as a whole, or not at all."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.device_memory import give_back, has_own_memory
from modeling_deepseek_moe.hybrid.layer import HybridMoE
from modeling_deepseek_moe.ops._memory import exhausted
from modeling_deepseek_moe.quantized.mapped import MappedExperts

HOST = ("cpu", "meta")


class Move(NamedTuple):
    """What is done to each tensor, by a model that sees to what fails; models within it leave that to it."""

    of_tensor: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.of_tensor(tensor)


class Part(NamedTuple):
    """A tensor of a module (``key``), or experts in mapped files, which lie in memory as they are moved (``key`` is ``None``)."""

    name: str
    nbytes: int
    module: nn.Module
    key: str | None

    def is_on(self, device: torch.device) -> bool:
        if self.key is None:
            return not isinstance(self.module, MappedExperts)
        found = self.module._parameters.get(self.key)
        found = self.module._buffers[self.key] if found is None else found
        return found.device == device


class MovingMixin(ModelMixin):
    """`_apply`, which ``.to``, ``.cuda`` and every wrapper's call. Mixed into the models before `PreTrainedModel`."""

    def _apply(self, fn, recurse=True):
        """As `nn.Module._apply`; what fails on the way to an accelerator leaves every tensor where it was.

        Where an accelerator shares the host's memory (MPS) tensors are given up one by one: to hold all of them until the last
        has arrived would take twice the model.

        Raises:
            torch.OutOfMemoryError: the accelerator has too little memory; nothing of the model stays there.
        """
        device = torch.device("cpu") if isinstance(fn, Move) else fn(torch.empty(0, device="cpu")).device
        if device.type in HOST or not has_own_memory(device):
            return super()._apply(fn, recurse)
        parts = [part for part in _parts(self, "") if not part.is_on(device)]
        before = _Before(self)
        try:
            moved = super()._apply(Move(fn), recurse)
            before.close_streams()
            return moved
        except BaseException as error:
            failure = exhausted(error) if isinstance(error, RuntimeError) else None
            at = next((f"{part.name} takes {part.nbytes:,} bytes, " for part in parts if not part.is_on(device)), "")
            before.restore()
            if failure is None:
                raise
        total = sum(part.nbytes for part in parts)
        raise torch.OutOfMemoryError(
            f"{device}: memory is exhausted, and the model stays where it was: {at}all that was to be moved {total:,} bytes "
            f'({failure}); now {give_back(device)}. from_pretrained(folder, device_map="auto") leaves routed experts on the CPU '
            "where a model does not fit."
        )


def _parts(module: nn.Module, prefix: str) -> Iterator[Part]:
    """In the order in which they are moved; experts that stay apart from an accelerator are not."""
    for name, child in module.named_children():
        if not (isinstance(module, HybridMoE) and child is module.experts):
            yield from _parts(child, f"{prefix}{name}.")
    if isinstance(module, MappedExperts):
        yield Part(prefix.removesuffix("."), module.mapped_bytes, module, None)
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield Part(f"{prefix}{key}", tensor.nbytes, module, key)


class _Before:
    """What a model's modules and tensors were, by reference: memory of the host is not given back meanwhile."""

    def __init__(self, model: nn.Module):
        self._modules = [
            (m, type(m), dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()
        ]
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t is not None]
        grads = [t.grad for t in tensors if t.grad is not None]
        self._tensors = [(tensor, tensor.data, tensor.grad) for tensor in (*tensors, *grads)]
        states = [getattr(tensor, "quant_state", None) for tensor in tensors]  # of bitsandbytes, moved in place
        states += [getattr(state, "state2", None) for state in states]
        self._states = [(state, dict(vars(state))) for state in states if state is not None]

    def close_streams(self) -> None:
        """Of experts that were read from files as they were needed, and no longer are."""
        for module, kind, attributes, *_ in self._modules:
            if type(module) is not kind and attributes.get("stream") is not None:
                attributes["stream"].cache.close()

    def restore(self) -> None:
        for module, kind, attributes, parameters, buffers in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for own, kept in ((module._parameters, parameters), (module._buffers, buffers)):
                own.clear()
                own.update(kept)
        for tensor, data, grad in self._tensors:
            tensor.data, tensor.grad = data, grad
        for state, attributes in self._states:
            vars(state).update(attributes)
