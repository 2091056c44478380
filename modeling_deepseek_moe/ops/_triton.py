"""The Triton kernels' way to a card: what it must be, why it cannot run them, and how a kernel is started.

Kernels lie in files of their own, ``ops/*/triton_kernels.py``, which need Triton to be imported; ``ops/*/triton.py`` imports
them as it starts one, so that the package imports without it.
"""

import contextlib
import importlib
import importlib.util
import re
from functools import cache
from types import ModuleType

import torch

from modeling_deepseek_moe.ops._dispatch import AUTO, requested_backend
from modeling_deepseek_moe.ops._libraries import announce, announce_fallback
from modeling_deepseek_moe.ops._memory import exhausted

OLDEST = 80  # Ampere: bf16 in its tensor cores, copies that do not wait
OLDEST_TRITON = (3, 6)  # that of the oldest torch that is supported
FP8_CORES = 89  # Ada and Hopper multiply FP8
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _unusable() -> str | None:
    """Why this process's Triton is not to be used on any card; ``None`` if it is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except Exception as error:  # one that was built for another Python, libc or torch raises what it likes
        return f"Triton cannot be imported ({_brief(error)})"
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST_TRITON:
        return f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or later, found {triton.__version__}"
    if triton.knobs.runtime.interpret:
        return (
            "is not for Triton's interpreter (TRITON_INTERPRET=1), which gets bf16 and FP8 wrong and does not say so"
        )
    return None


@cache
def _cannot_start(index: int) -> str | None:
    """Why Triton starts no kernel on a card, found by starting one that does nothing; ``None`` if it does.

    Before the first kernel of a process Triton compiles C that needs a compiler and Python's headers, runs ``ptxas`` and writes
    to a cache; each can be missing. Memory that ends is raised: there may be more the next time.
    """
    try:
        with torch.cuda.device(index):
            from modeling_deepseek_moe.ops._triton_probe import nothing

            nothing[(1,)]()
    except Exception as error:  # Triton's, a subprocess's, the operating system's
        if exhausted(error):
            raise
        return f"Triton cannot start a kernel ({_brief(error)})"
    return None


def _brief(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Of a CUDA device: 80 for SM80."""
    return _capability(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@torch.compiler.assume_constant_result
def refusal(device: torch.device, oldest: int = OLDEST) -> str | None:
    """Why no kernel runs on ``device``; ``None`` if one does. ``oldest``: the generation that the kernel needs, 80 for SM80."""
    if device.type != "cuda":
        return f"needs CUDA, got {device.type}"
    reason = _refusal_of_card(device, oldest)
    if reason is None:
        announce(str(device), capability(device))
    elif requested_backend() == AUTO:
        announce_fallback(str(device), reason)
    return reason


def _refusal_of_card(device: torch.device, oldest: int) -> str | None:
    if torch.version.hip:
        return "needs CUDA, got ROCm"
    found = capability(device)
    if found < oldest:
        return f"needs SM{oldest}, found SM{found}"
    return _unusable() or _cannot_start(_index(device))


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
