"""torch's own product of codes with codes, which is cuBLAS's on SM90: whether it is there and right, and how it is called."""

from functools import cache

import torch
import torch.nn.functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)
CARD = (9, 0)


@torch.compiler.disable
def unsuitable(device: torch.device, weight: torch.Tensor) -> str | None:
    """Why a product with this weight is not for `multiply`; ``None`` if it is. The first call on a device tries it out."""
    n, k = weight.shape
    if n % 128 or k % 512:  # its scales would have to be copied, with padding
        return f"wants a weight of whole blocks, four of them in each row, found {[n, k]}"
    return _unavailable(device)


@cache
def _unavailable(device: torch.device) -> str | None:
    reason = _tried(device)
    taken = "torch.nn.functional.scaled_mm (cuBLAS)" if reason is None else f"Triton, since scaled_mm {reason}"
    logger.info(f"FP8 products of many rows on {device}: {taken}")
    return reason


def _tried(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CARD:
        return "has blocks of 128 × 128 on SM90 only"
    if not hasattr(F, "scaled_mm"):
        return f"is not in torch {torch.__version__}"
    if torch.cuda.is_current_stream_capturing():
        return "was not tried before a CUDA graph was captured"
    a, b = (torch.ones((128, 512), device=device).to(torch.float8_e4m3fn) for _ in range(2))
    try:
        found = multiply(
            a, torch.ones((4, 128), device=device).t(), b, torch.ones((1, 4), device=device), torch.bfloat16
        )
    except (RuntimeError, NotImplementedError) as error:  # what torch raises for a cuBLAS that is too old
        return f"raised {type(error).__name__}: {str(error).splitlines()[0]}"
    return None if bool((found == 512).all()) else "gave a wrong product"


def multiply(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``A [M, K] · B [N, K]ᵀ``; scales of A ``[M, K/128]`` lie tile by tile, those of B are ``[N/128, K/128]``."""
    recipes = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(a, b.t(), a_scale, recipes[0], b_scale.t(), recipes[1], output_dtype=dtype)
