"""The Triton kernels' way to a card: what it must be, why it cannot run them, and how a kernel is started.

Kernels lie in files of their own, ``ops/*/triton_kernels.py``, which need Triton to be imported; ``ops/*/triton.py`` imports
them as it starts one, so that the package imports without it.
"""

import contextlib
import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from modeling_deepseek_moe.ops._libraries import announce

OLDEST = 80  # Ampere: bf16 in its tensor cores, copies that do not wait
FP8_CORES = 89  # Ada and Hopper multiply FP8
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Of a CUDA device: 80 for SM80."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@torch.compiler.assume_constant_result
def refusal(device: torch.device, oldest: int = OLDEST) -> str | None:
    """Why no kernel runs on ``device``; ``None`` if one does. ``oldest``: the generation that the kernel needs, 80 for SM80."""
    if device.type != "cuda" or torch.version.hip:
        return f"needs CUDA, got {'ROCm' if device.type == 'cuda' else device.type}"
    if not _is_installed():
        return "triton is not installed"
    found = capability(device)
    if found < oldest:
        return f"needs SM{oldest}, found SM{found}"
    announce(str(device), found)
    return None


def unsupported_reason(*tensors: torch.Tensor | None, gradients: bool = False) -> str | None:
    """Why no kernel can take these tensors, the first of which there is; ``None`` if one can.

    Args:
        gradients: the caller sees to them.
    """
    found = [tensor for tensor in tensors if tensor is not None]
    device = found[0].device
    if any(tensor.device != device for tensor in found):
        return f"needs tensors on one device, found {' and '.join(sorted({str(tensor.device) for tensor in found}))}"
    reason = refusal(device)
    if reason is None and not gradients and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in found):
        reason = "computes no gradients"
    return reason


def unsupported_floats(*tensors: torch.Tensor) -> str | None:
    """Why activations do not suit: they have to be of one dtype, bf16, fp16 or fp32."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        return f"takes activations in one of bf16, fp16 and fp32, found {', '.join(sorted(map(str, dtypes)))}"
    return None


@torch.compiler.assume_constant_result
def processors(device: torch.device) -> int:
    """A card's streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def kernels(operation: str, file: str = "triton_kernels") -> ModuleType:
    """The kernels of one of the folders of ``ops``."""
    return importlib.import_module(f"modeling_deepseek_moe.ops.{operation}.{file}")


@cache
def words_of(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """int32 ``[8, 8]``: sixteen values in bf16 as `_triton_groups.table_of` reads them, low bytes, then high ones, each word eight times."""
    pairs = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16).view(torch.uint8).view(16, 2)
    return pairs.t().contiguous().view(torch.int32).reshape(8, 1).repeat(1, 8).to(device)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *arguments, warps: int = 4, **constants) -> None:
    """Start ``grid`` programs of a kernel on a device; none where a side of the grid is 0.

    Args:
        arguments: tensors and numbers, in the kernel's order.
        warps: of a program.
        constants: what a kernel is compiled for.
    """
    if 0 in grid:
        return
    # Triton starts kernels on the current device, whatever its tensors are on
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, num_warps=warps, **constants)


def blocks(size: int, block: int) -> int:
    """⌈size / block⌉."""
    return -(-size // block)


def padded(size: int) -> int:
    """`power_of_two`, and no less than the depth of a product."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The smallest that is not below ``size``, as the sides of a kernel's tiles must be."""
    return 1 << max(size - 1, 0).bit_length()
