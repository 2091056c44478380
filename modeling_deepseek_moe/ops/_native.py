"""The CPU engine in C (`csrc/`): where it is, why it cannot run, and how it is called.

It is built with the package where there is a compiler, and called by ctypes on data pointers: no torch headers, one
binary for every torch. It runs on OpenMP, as torch does: torch's OpenMP library is the one that is loaded, so both
share one pool of threads, which never compete for the cores.
"""

import ctypes
import importlib.util
import os
import struct
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch

from modeling_deepseek_moe import cgroups
from modeling_deepseek_moe.ops import _structs
from modeling_deepseek_moe.ops._dispatch import CPU, BackendError, logger, requested

MODULE = "modeling_deepseek_moe.ops._engine"
VERSION = 10  # DSM_VERSION
DTYPES = _structs.DTYPES
ACTIVATIONS = (torch.bfloat16, torch.float32, torch.float16)
_NO_MEMORY, _NOT_FINITE, _BAD_INDEX = -1, -3, -4
# A process forked from this one has none of its OpenMP threads, torch's included: waiting for them would never end.
_PROCESS = os.getpid()

# name -> argument types; all return int
_SIGNATURES = {
    "dsm_version": (),
    "dsm_has_threads": (),
    "dsm_isa_best": (),
    "dsm_isa_name": (c_int,),
    "dsm_layout": (c_int, POINTER(c_int64), POINTER(c_int64)),
    "dsm_linear": (c_int, c_int, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
    "dsm_experts": (
        *(c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
        *(c_void_p, c_void_p, c_void_p),
    ),
    "dsm_experts_low_rank": (
        *(c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "dsm_moe": (c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "dsm_step": (c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    "dsm_logits": (c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "dsm_rms_norm": (c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "dsm_mla_decode": (
        *(c_int, c_int, c_int, c_int64, c_int64, c_int64, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_void_p),
    ),
    "dsm_index": (c_int, c_int, c_int, c_void_p, c_void_p, c_int64, c_void_p),
    "dsm_sparse_attention": (
        *(c_int, c_int, c_int, c_int64, c_int64, c_int64, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_float, c_void_p),
    ),
    "dsm_mla_project": (
        *(c_int, c_int, c_int, c_void_p, c_int64, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "dsm_route": (c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    "dsm_dequantize": (c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
    "dsm_dequantize_four_bit": (c_int, c_int, c_void_p, c_void_p, c_int),
    "dsm_quantize": (c_int, c_int, c_void_p, c_int, c_int64, c_int64, c_int, c_void_p, c_void_p),
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
        if not _is_whole(spec.origin):
            return None, f"is cut short ({spec.origin}): reinstall the package"
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"cannot be loaded: {error}. Reinstall the package"
    version = getattr(library, "dsm_version", None)
    if version is None or version() != VERSION or not all(hasattr(library, name) for name in _SIGNATURES):
        return None, f"is of another version ({spec.origin}): reinstall the package"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.dsm_isa_name.restype = library.dsm_layout.restype = c_char_p
    for name, found, wanted in _misplaced(library):
        return (
            None,
            f"has another layout ({spec.origin}): {name}: found {found}, wanted {wanted}: reinstall the package",
        )
    if not library.dsm_has_threads():
        logger.warning_once(
            "The CPU engine was built without OpenMP and runs on one thread. Reinstall the package with a compiler "
            "that has it."
        )
    return library, None


def _is_whole(file: str) -> bool:
    """Whether an ELF library reaches to the end of its section table, which comes last.

    The loader maps what is missing of a file that was cut short, and the process dies as it reads there.
    """
    with open(file, "rb") as stream:
        header, size = stream.read(64), os.fstat(stream.fileno()).st_size
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return True  # no 64-bit ELF: the loader says what is wrong
    (start,), (entry, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return start + entry * count <= size


def _misplaced(library: ctypes.CDLL) -> Iterator[tuple[str, str, str]]:
    """The structs and fields that lie elsewhere in the library than here, with what was found there and here."""
    wanted, found, offset, size = _structs.layout(), {}, c_int64(), c_int64()
    while name := library.dsm_layout(len(found), byref(offset), byref(size)):
        found[name.decode()] = offset.value, size.value
    for name in {**wanted, **found}:
        places = found.get(name), wanted.get(name)
        if places[0] != places[1]:
            yield name, *("none" if place is None else "{1} bytes at {0}".format(*place) for place in places)


def missing() -> str | None:
    """Why there is no engine in this process, and what helps; ``None`` if there is one."""
    return _load()[1]


@torch.compiler.assume_constant_result
def unavailable_reason() -> str | None:
    """Why the engine cannot run in this process; ``None`` if it can. What ``auto`` falls back from is logged, once.

    Raises:
        BackendError: it cannot, and was asked for by name. That holds for operations too that plain torch would do.
    """
    reason = _load()[1]
    if reason is not None and requested().backend == CPU:
        raise BackendError(f"backend {CPU!r}: the CPU engine {reason}")
    if reason is not None:
        logger.warning_once(f"The CPU engine {reason}. FP8 runs on the reference path, tens of times slower.")
    return reason


def unsupported_activations(x: torch.Tensor) -> str | None:
    """Why the engine cannot take ``x`` as activations; ``None`` if it can."""
    reason = unavailable_reason()
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


@cache
def _most_threads() -> int:
    """As many as this process has processors for, by the quota of its control groups as it first calls the engine."""
    return cgroups.threads(sys.maxsize)


def call(function: str, *arguments) -> None:
    """Call ``function`` on the requested instruction set and as many threads as torch uses; one in a forked process.

    Raises:
        BackendError: there is no engine, or this CPU has not the instruction set that `use_backend` names.
        MemoryError: no memory for its workspace.
        FloatingPointError: values that are not finite, where finite ones are wanted.
        IndexError: indices of what is not there.
    """
    threads = min(torch.get_num_threads(), _most_threads()) if os.getpid() == _PROCESS else 1
    library, reason = _load()
    if reason is not None:
        raise BackendError(f"backend {CPU!r}: the CPU engine {reason}")
    isa, level = requested().isa, -1  # the best
    if isa is not None and isa not in instruction_sets():
        found = ", ".join(instruction_sets())
        raise BackendError(f"backend '{CPU}:{isa}' needs a CPU with {isa}; this one has {found}")
    if isa is not None:
        level = instruction_sets().index(isa)
    result = getattr(library, function)(level, threads, *arguments)
    if result == _NO_MEMORY:
        raise MemoryError(f"{function}: no memory for the workspace")
    if result == _NOT_FINITE:
        raise FloatingPointError(f"{function}: found NaN or Inf, wanted finite values")
    if result == _BAD_INDEX:
        raise IndexError(f"{function}: found an index out of range")
    if result:
        raise AssertionError(f"{function} returned {result}")


def check_scale(operation: str, weight: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """Refuse scales that are not one for each block of a matrix."""
    wanted = [-(-size // 128) for size in weight.shape]
    if list(scale_inv.shape) != wanted:
        raise ValueError(f"{operation}: found scales {list(scale_inv.shape)}, wanted {wanted}")


def describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} in {tensor.dtype}"


def fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and in fp32: mostly itself, which `Tensor.float` would take longer to find."""
    return tensor.contiguous() if tensor.dtype == torch.float32 else tensor.float().contiguous()


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A mask, boolean (True attends) or floating-point, as fp32 values to add to scores."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return fp32(mask)
