"""Whether something is attached to the calls of modules, so that these cannot be left out."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.module import _has_any_global_hook as every_module_is_hooked  # torch has no public name for it

from modeling_deepseek_moe.compat import is_idle

__all__ = ["any_hooked", "differs_by_row", "every_module_is_hooked", "is_hooked"]


def is_hooked(module: nn.Module) -> bool:
    """Whether something happens when the module is called besides the ``forward`` of its class."""
    return any_hooked((module.__dict__,))


def differs_by_row(layer: nn.Module) -> bool:
    """Whether peft gives each sequence of a batch an adapter of its own as the layer is called, so that it has no one weight."""
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in layer._forward_pre_hooks.values())


def any_hooked(attributes: Iterable[dict]) -> bool:
    """`is_hooked` of any of the modules whose ``__dict__`` are given."""
    # looked for where they are kept, in one loop: a call for each module and token would take as long again
    for own in attributes:
        if own["_forward_pre_hooks"] or "_hf_hook" in own or "forward" in own:
            return True
        if own["_forward_hooks"] and not all(map(is_idle, own["_forward_hooks"].values())):
            return True
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
    return False
