"""FlashAttention 3 and 4, forwards and backwards, where the machine has one and it is faster than torch's: see `_trials`."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops._dispatch import FLASH_ATTENTION_3, FLASH_ATTENTION_4, insists_on
from modeling_deepseek_moe.ops._libraries import Call, current, function_of, lacks, refusal
from modeling_deepseek_moe.ops._trials import OF_ATTENTION, Trial, random, step, trials

CALL = Call("flash_attn_func", ("q", "k", "v", "softmax_scale", "causal"))
CALLS = {FLASH_ATTENTION_3: CALL, FLASH_ATTENTION_4: CALL}
FEW_TOKENS = 128  # up to which a prompt is not worth a trial
MOST_TOKENS = 1 << 14  # what is faster for that number is for more


def unsuitable(
    library: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_plain: bool,
    scaling: float,
    own: Callable[..., torch.Tensor],
) -> str | None:
    """Why a library does not attend; ``None`` if it does. The first call for such a shape tries it out.

    Args:
        is_plain: each token attends to itself and those before it, to no others and with no dropout.
        own: torch's attention, of the three tensors.
    """
    if query.device.type != "cuda":
        return f"needs CUDA, got {query.device.type}"
    if torch.compiler.is_compiling():
        return "is not called in graphs"
    if not is_plain:
        return "attends causally, with no other mask, no bias and no dropout"
    length = query.shape[2]
    if length != key.shape[2] or (length <= FEW_TOKENS and not insists_on(library)):
        return f"is for prompts of more than {FEW_TOKENS} tokens, found {length} new ones of {key.shape[2]}"
    dtypes = {tensor.dtype for tensor in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= set(OF_ATTENTION) or torch.is_autocast_enabled("cuda"):
        return f"takes bf16 or fp16, and no autocast, found {', '.join(sorted(map(str, dtypes)))}"
    reason = refusal(library, _triton.capability(query.device)) or lacks(library, CALLS[library])
    return reason or _tried(library, (query, key, value), scaling, own)


def _tried(library: str, tensors, scaling: float, own: Callable[..., torch.Tensor]) -> str | None:
    query, _, value = tensors
    (batch, heads, length, width), needed = query.shape, tuple(tensor.requires_grad for tensor in tensors)
    needed = needed if torch.is_grad_enabled() else (False, False, False)
    theirs = partial(attend, library, scaling=scaling)
    rows = _triton.power_of_two(batch), _triton.power_of_two(min(length, MOST_TOKENS))

    def make() -> Trial:
        shapes = [(2, 3, FEW_TOKENS + 5, size) for size in (width, width, value.shape[-1])]
        small = [random(*shape, like=query, seed=seed) for seed, shape in enumerate(shapes)]
        needs = (any(needed),) * 3
        return Trial(
            lambda: step(theirs, small, needs),
            lambda: step(partial(_defined, scaling=scaling), [tensor.float() for tensor in small], needs),
            OF_ATTENTION[query.dtype],
            lambda: step(theirs, tensors, needed),
            lambda: step(own, tensors, needed),
        )

    operation = "attention over prompts" + (", with gradients" if any(needed) else "")
    return trials().reason(library, operation, query, (heads, width, value.shape[-1], *rows), make)


def _defined(query, key, value, scaling: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)


def attend(library: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """``[B, H, S, d]``, ``[B, H, S, d]`` and ``[B, H, S, v]`` → ``[B, S, H, v]``, causal; nothing is padded or copied."""
    function = function_of(library, CALLS[library])
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with current(query.device):
        found = function(*tensors, softmax_scale=scaling, causal=True)
    return found[0] if isinstance(found, tuple) else found  # some releases give log-sum-exps too
