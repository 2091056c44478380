"""Kernel libraries of others that a machine may have: for which cards, by which calls, or why this package calls none of theirs.

Their calls differ from release to release, and none was run here on a card that it is for. So whether one is used is found out
on the very machine (`_trials`); here it says what is there. The log says once for each card what computes there.
"""

import contextlib
import importlib
import inspect
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from modeling_deepseek_moe.ops._dispatch import (
    DEEP_GEMM,
    FLASH_ATTENTION_3,
    FLASH_ATTENTION_4,
    LIGER,
    UNUSED,
    BackendError,
)

logger = logging.get_logger(__name__)


class Call(NamedTuple):
    """A library's function: ``parameters`` are those that it is called with, by name or in this order."""

    function: str
    parameters: tuple[str, ...]


class Library(NamedTuple):
    """
    Args:
        packages: names under which it is installed.
        module: what is imported.
        oldest, latest: the cards for which this package knows its calls, 90 for SM90.
    """

    name: str
    packages: tuple[str, ...]
    module: str
    purpose: str
    oldest: int
    latest: int


LIBRARIES = {
    # later cards want scales that are powers of two, to which it would round those of a release
    DEEP_GEMM: Library("DeepGEMM", ("sgl-deep-gemm", "deep-gemm"), "deep_gemm", "FP8 products", 90, 90),
    LIGER: Library("Liger", ("liger-kernel",), "liger_kernel.ops", "norms and SwiGLU with gradients", 80, 999),
    # on other cards it takes values as wide as keys only
    FLASH_ATTENTION_3: Library("FlashAttention 3", ("flash-attn-3",), "flash_attn_interface", "attention", 90, 90),
    FLASH_ATTENTION_4: Library(
        "FlashAttention 4", ("flash-attn-4",), "flash_attn.cute", "attention over prompts", 90, 119
    ),
    "flash_mla": Library("FlashMLA", ("sgl-flash-mla", "flash-mla"), "flash_mla", "latent attention", 90, 109),
    "humming": Library("humming", ("humming-kernels",), "humming", "products of few-bit weights", 75, 999),
}


@cache
def installed(packages: tuple[str, ...]) -> str | None:
    """Name and version of the first of them that is there; nothing is imported."""
    for package in packages:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return None


@cache
def refusal(library: str, card: int) -> str | None:
    """Why a library is not for such a card, or not there; ``None`` if it may be called. ``card``: 90 for SM90."""
    row = LIBRARIES[library]
    found = installed(row.packages)
    if found is None:
        return f"is not installed ({' or '.join(row.packages)})"
    if library in UNUSED:
        return UNUSED[library]
    if not row.oldest <= card <= row.latest:
        last = "" if row.latest == row.oldest else " and later" if row.latest == 999 else f" to SM{row.latest}"
        return f"is called on SM{row.oldest}{last}, found SM{card}"
    return None


def lacks(library: str, call: Call) -> str | None:
    """Why a library has no such function: what importing it raised, or what its release lacks; ``None`` if it has one.

    A function that does not tell its parameters, as compiled ones do not, counts: what it makes of them is seen in a trial.
    """
    return _resolved(library, call)[1]


def function_of(library: str, call: Call) -> Any:
    """The function that `lacks` has nothing against."""
    function, reason = _resolved(library, call)
    if reason is not None:
        raise BackendError(f"{LIBRARIES[library].name}: {reason}")
    return function


@cache
def _resolved(library: str, call: Call) -> tuple[Any, str | None]:
    row = LIBRARIES[library]
    release, wanted = installed(row.packages), f"{call.function}({', '.join(call.parameters)})"
    try:
        module = importlib.import_module(row.module)
    except Exception as error:  # whatever a library of others does as it looks for its compiler and its card
        return None, f"{release} cannot be imported: {told(error)}"
    function = getattr(module, call.function, None)
    if function is None:
        return None, f"{release} has no {wanted}"
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters
    except ValueError:
        return function, None
    missing = [name for name in call.parameters if name not in parameters]
    return function, f"{release} has no {wanted}: no {', '.join(missing)}" if missing else None


def forget() -> None:
    """What was found out about this machine's libraries is to be found out again, and told."""
    for function in (installed, refusal, _resolved, announce, announce_fallback):
        function.cache_clear()


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current one, on which libraries start their kernels whatever their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def told(error: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@cache
def announce(device: str, card: int) -> None:
    """One line in the log, once for each device: what computes there, and of what is installed, what is tried and what lies idle."""
    tried, idle = [], []
    for library, row in LIBRARIES.items():
        reason, found = refusal(library, card), installed(row.packages)
        if found is not None:
            (tried if reason is None else idle).append(f"{found} ({row.purpose if reason is None else reason})")
    rest = f"; tried at first use: {', '.join(tried)}" if tried else ""
    rest += f"; installed and not used: {', '.join(idle)}" if idle else ""
    logger.info(f"{device} (SM{card}): this package's kernels, by {installed(('triton',))}, and torch's{rest}")


@cache
def announce_fallback(device: str, reason: str) -> None:
    """One warning, once for each device and reason: what computes there instead of this package's kernels, and why."""
    logger.warning(f"{device}: plain torch computes in place of this package's kernels, which is slower: {reason}")
