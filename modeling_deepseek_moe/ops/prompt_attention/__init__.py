"""Attention of a prompt over itself: softmax(q kᵀ · scaling, causal) v, keys wider than values.

Which function attends is the model's ``attn_implementation``, as everywhere in transformers; where that is torch's own
(``sdpa``), FlashAttention 3 or 4 does on a card where it is faster.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_deepseek_moe.ops._dispatch import requested_backend, takes
from modeling_deepseek_moe.ops.prompt_attention import flash_attention

__all__ = ["attend", "flash_attention", "interface"]

SDPA = "sdpa"
CHANGES = ("position_bias", "softcap")  # of scores, by transformers' names


def interface(name: str, default: Callable) -> Callable:
    """The function that ``attn_implementation=name`` stands for, ``default`` for "eager"."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
    return partial(attend, function) if name == SDPA else function


def attend(
    sdpa: Callable,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers' functions: ``query``, ``key`` ``[B, H, S, d]``, ``value [B, H, S, v]`` → ``[B, S, H, v]`` and ``None``.

    Args:
        sdpa: transformers' function of torch's attention, with these arguments.
        attention_mask: ``None``: causal, unless ``is_causal`` or else the module says otherwise.
    """
    tensors, scale = (query, key, value), query.shape[-1] ** -0.5 if scaling is None else scaling
    own = partial(_by_torch, sdpa, module, scaling=scaling, **kwargs)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    changed = attention_mask is not None or dropout or any(kwargs.get(name) is not None for name in CHANGES)
    is_plain = bool(is_causal and not changed)
    wanted = requested_backend()
    for library in (wanted,) if wanted in flash_attention.CALLS else flash_attention.CALLS:
        if takes(
            library,
            "attention over prompts",
            partial(flash_attention.unsuitable, library, *tensors, is_plain, scale, own),
        ):
            return flash_attention.attend(library, *tensors, scale), None
    return sdpa(module, *tensors, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _by_torch(sdpa: Callable, module: torch.nn.Module, query, key, value, **arguments) -> torch.Tensor:
    return sdpa(module, query, key, value, None, **arguments)[0]
