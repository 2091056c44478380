"""FlashAttention 3 over the latent cache, where the machine has it and it is faster: see `_trials`.

Latents are its values and, by the queries ``qv``, a part of its keys: it takes them and the rotated keys apart, as caches here
hold them. (FlashMLA wants both in one row, in pages of 64 tokens: joining them at each token moves more than attending reads.)
"""

from collections.abc import Callable

import torch

from modeling_deepseek_moe.ops._dispatch import FLASH_ATTENTION_3
from modeling_deepseek_moe.ops._libraries import Call, current, function_of, lacks, refusal
from modeling_deepseek_moe.ops._trials import OF_ATTENTION, Trial, random, trials
from modeling_deepseek_moe.ops._triton import power_of_two

CALL = Call("flash_attn_with_kvcache", ("q", "k_cache", "v_cache", "qv", "softmax_scale"))
RANK, ROPE = 512, 64  # that it has kernels for
MOST_TOKENS = 1 << 17  # what is faster for that number is for more


def unsuitable(
    card: int,
    q_nope: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    masked: bool,
    scaling: float,
    theirs: Callable[[], object],
    own: Callable[[], object],
) -> str | None:
    """Why it does not attend; ``None`` if it does. The first call for such a shape tries it out.

    Args:
        theirs, own: the whole of attention, on the operands in use.
    """
    reason = refusal(FLASH_ATTENTION_3, card)
    if reason is not None:
        return reason
    if masked:
        return "attends to all keys of a cache, found a mask (padding, or a static cache)"
    if (c_kv.shape[3], k_pe.shape[3]) != (RANK, ROPE) or {q_nope.dtype, c_kv.dtype, k_pe.dtype} - set(OF_ATTENTION):
        found = f"{c_kv.dtype}, {c_kv.shape[3]} and {k_pe.shape[3]}"
        return f"has kernels for latents and keys of {RANK} and {ROPE} numbers in bf16 and fp16, found {found}"
    reason = lacks(FLASH_ATTENTION_3, CALL)
    if reason is not None:
        return reason
    batch, heads = q_nope.shape[:2]

    def make() -> Trial:
        shapes = (2, heads, RANK), (2, heads, ROPE), (2, 1, 200, RANK), (2, 1, 200, ROPE)
        small = [random(*shape, like=q_nope, seed=seed) for seed, shape in enumerate(shapes)]
        return Trial(
            lambda: [attend(*small, scaling=scaling)],
            lambda: [_defined(*[tensor.float() for tensor in small], scaling=scaling)],
            OF_ATTENTION[q_nope.dtype],
            theirs,
            own,
        )

    # a new verdict as a cache or a batch doubles
    sizes = power_of_two(batch), power_of_two(min(c_kv.shape[2], MOST_TOKENS))
    return trials().reason(FLASH_ATTENTION_3, "attention over latents", q_nope, (heads, *sizes), make)


def attend(
    latent: torch.Tensor, q_pe: torch.Tensor, c_kv: torch.Tensor, k_pe: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """softmax((c_kv latent + k_pe q_pe) · scaling) c_kv of one new token, ``[B, H, r]``.

    Args:
        latent, q_pe: ``[B, H, r]`` and ``[B, H, p]``.
        c_kv, k_pe: ``[B, 1, kv, r]`` and ``[B, 1, kv, p]``, read where they lie.
    """
    function = function_of(FLASH_ATTENTION_3, CALL)
    with current(latent.device):
        found = function(
            q_pe.unsqueeze(1),
            k_pe.transpose(1, 2),
            c_kv.transpose(1, 2),
            qv=latent.unsqueeze(1),
            softmax_scale=scaling,
        )
    return (found[0] if isinstance(found, tuple) else found).squeeze(1)


def _defined(latent, q_pe, c_kv, k_pe, *, scaling: float) -> torch.Tensor:
    scores = latent @ c_kv[:, 0].transpose(1, 2) + q_pe @ k_pe[:, 0].transpose(1, 2)
    return torch.softmax(scores * scaling, dim=-1) @ c_kv[:, 0]
