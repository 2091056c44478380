"""DeepGEMM's product of codes with codes, where the machine has it and it is faster: see `_trials`.

Scales of A lie tile by tile, rows padded to whole 16 bytes, as `triton.quantize_tiles` makes them ``by_tile``; those of B are a
release's. It sums as this package's kernels do, 128 products at a time, and writes bf16.
"""

from collections.abc import Callable

import torch

from modeling_deepseek_moe.ops._dispatch import DEEP_GEMM
from modeling_deepseek_moe.ops._libraries import Call, current, function_of, lacks, refusal
from modeling_deepseek_moe.ops._trials import Trial, random, trials
from modeling_deepseek_moe.ops.block_fp8 import reference

CALL = Call("fp8_gemm_nt", ("a", "b", "d"))
WHOLE_ROWS, WHOLE_COLUMNS = 64, 128  # of the weight
TOLERANCE = 4e-3  # twice what rounding to bf16 may take


def unsupported(card: int, x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why it cannot multiply ``x [..., K]``, quantised, with FP8 ``weight [N, K]``; ``None`` if it may be tried."""
    reason = refusal(DEEP_GEMM, card)
    if reason is not None:
        return reason
    if x.dtype != torch.bfloat16:
        return f"writes bf16, found {x.dtype}"
    if weight.shape[0] % WHOLE_ROWS or weight.shape[1] % WHOLE_COLUMNS:
        return f"wants N of whole {WHOLE_ROWS} and K of whole {WHOLE_COLUMNS}, found {list(weight.shape)}"
    return lacks(DEEP_GEMM, CALL)


def unsuitable(
    x: torch.Tensor,
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    theirs: Callable[[], object],
    own: Callable[[], object],
    rows: int,
) -> str | None:
    """Why it is not taken for ``x [M, K]``; ``None`` if it is. The first call for such a shape tries it out.

    Args:
        quantize: `triton.quantize_tiles`, scales by tile.
        theirs, own: the whole layer on ``x``, either way.
        rows: M, rounded up: what a verdict holds for.
    """

    def make() -> Trial:
        a, b = random(72, 512, like=x), random(256, 512, like=x, seed=1)
        b, b_scale = reference.quantize(b, (128, 128), False)
        # blocks that differ much: one taken for another would be seen
        b_scale = b_scale * (1 + torch.arange(b_scale.numel(), device=x.device).view(b_scale.shape))
        a_codes, a_scale = quantize(a)
        return Trial(
            lambda: [multiply(a_codes, a_scale, b, b_scale)],
            lambda: [reference.gemm(a_codes, a_scale, b, b_scale.repeat_interleave(128, 0))],
            TOLERANCE,
            theirs,
            own,
        )

    return trials().reason(DEEP_GEMM, "FP8 linear", x, (*weight.shape, rows), make)


def multiply(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """``A [M, K] · B [N, K]ᵀ`` in bf16; scales of A ``[M, K/128]`` lie tile by tile, those of B are ``[N/128, K/128]``."""
    function = function_of(DEEP_GEMM, CALL)
    out = a.new_empty((len(a), len(b)), dtype=torch.bfloat16)
    with current(a.device):
        function((a, a_scale), (b, b_scale), out)
    return out
