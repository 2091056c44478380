"""The CPU engine in C (`csrc/`): where it is, why it cannot run, and how it is called.

It is built with the package where there is a compiler, and called by ctypes on data pointers: no torch headers, one
binary for every torch. It runs on OpenMP, as torch does: torch's OpenMP library is the one that is loaded, so both
share one pool of threads, which never compete for the cores.
"""

import ctypes
import importlib.util
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch

from modeling_deepseek_moe.ops._dispatch import CPU, BackendError, logger, requested

MODULE = "modeling_deepseek_moe.ops._engine"
VERSION = 1  # DSM_VERSION
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
ACTIVATIONS = (torch.bfloat16, torch.float32, torch.float16)
_NO_MEMORY, _NOT_FINITE = -1, -3

# name -> argument types; all return int
_SIGNATURES = {
    "dsm_version": (),
    "dsm_has_threads": (),
    "dsm_isa_best": (),
    "dsm_isa_name": (c_int,),
    "dsm_linear": (
        *(c_int, c_int, c_int, c_void_p, c_int64),
        *(c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    ),
    "dsm_experts": (
        *(c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_int64),
        *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p),
    ),
    "dsm_rms_norm": (c_int, c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p),
    "dsm_dequantize": (c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
    "dsm_quantize": (c_int, c_int, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or ``None`` and the reason."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.origin:
        return None, (
            "was not built: no C compiler was found when the package was installed. Install gcc or clang, then "
            "reinstall the package"
        )
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"cannot be loaded: {error}"
    version = getattr(library, "dsm_version", None)
    if version is None or version() != VERSION:
        return None, f"is of another version ({spec.origin}): reinstall the package"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.dsm_isa_name.restype = c_char_p
    return library, None


@torch.compiler.assume_constant_result
def refusal() -> str | None:
    """Why the engine cannot run in this process; ``None`` if it can. What ``auto`` falls back from is logged, once."""
    reason = _load()[1]
    if reason is not None:
        logger.warning_once(f"The CPU engine {reason}. FP8 runs on the reference path, tens of times slower.")
    return reason


def refuses_activations(x: torch.Tensor) -> str | None:
    """Why the engine cannot take ``x`` as activations; ``None`` if it can."""
    reason = refusal()
    if reason is not None:
        return reason
    if x.device.type != "cpu":
        return f"needs CPU tensors, found {x.device}"
    if x.dtype not in ACTIVATIONS:
        return f"takes activations in {', '.join(str(dtype) for dtype in ACTIVATIONS)}, found {x.dtype}"
    return None


@cache
def instruction_sets() -> tuple[str, ...]:
    """What this CPU can run of the engine, the slowest first; empty without the engine."""
    library = _load()[0]
    if library is None:
        return ()
    return tuple(library.dsm_isa_name(level).decode() for level in range(library.dsm_isa_best() + 1))


def level() -> int:
    """The index of the instruction set to use: the best, unless `use_backend` names one.

    Raises:
        BackendError: the one that was asked for is not among those of this CPU.
    """
    isa = requested().isa
    if isa is None:
        return -1
    if isa not in instruction_sets():
        found = ", ".join(instruction_sets())
        raise BackendError(f"backend '{CPU}:{isa}' needs a CPU with {isa}; this one has {found}")
    return instruction_sets().index(isa)


def call(function: str, *arguments) -> None:
    """Call ``function`` on the requested instruction set and as many threads as torch uses.

    Raises:
        MemoryError: no memory for its workspace.
        FloatingPointError: values that are not finite, where finite ones are wanted.
    """
    result = getattr(_load()[0], function)(level(), torch.get_num_threads(), *arguments)
    if result == _NO_MEMORY:
        raise MemoryError(f"{function}: no memory for the workspace")
    if result == _NOT_FINITE:
        raise FloatingPointError(f"{function}: found NaN or Inf, wanted finite values")
    if result:
        raise AssertionError(f"{function} returned {result}")


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
