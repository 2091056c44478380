"""Which backend runs an operation: the one place where that is decided, and that can say why.

Each operation asks `choose` with its backends in order of preference and, for each, the reason why it cannot run on
these very arguments (``None``: it can). ``auto`` takes the first that can; a backend asked for by name runs or raises. The
name of a library asks for it where an operation can be that library's, and leaves the others to ``auto``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)
AUTO, REFERENCE, CPU, TRITON = "auto", "reference", "cpu", "triton"
DEEP_GEMM, LIGER = "deep_gemm", "liger"
FLASH_ATTENTION_3, FLASH_ATTENTION_4 = "flash_attention_3", "flash_attention_4"
LIBRARIES = (DEEP_GEMM, LIGER, FLASH_ATTENTION_3, FLASH_ATTENTION_4)
BACKENDS = (AUTO, REFERENCE, CPU, TRITON, *LIBRARIES)
# libraries that might be expected, and why nothing of them is called
UNUSED = {
    "flash_mla": "reads latents and rotated keys from one row, in pages of 64 tokens; caches here hold them apart",
    "humming": "reads weights in an order of its own, which would be a second copy of all codes",
}
ENVIRONMENT = "DEEPSEEK_MOE_BACKEND"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


@dataclass(frozen=True)
class Request:
    """``backend`` is one of `BACKENDS`; ``isa`` the highest instruction set that the CPU engine may use."""

    backend: str = AUTO
    isa: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Request":
        """``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, a library's name, or ``"cpu:avx2"`` with an instruction set."""
        backend, _, isa = text.partition(":")
        if backend in UNUSED:
            raise BackendError(f"backend {backend!r} is not used: it {UNUSED[backend]}")
        if backend not in BACKENDS or (isa and backend != CPU):
            raise ValueError(f"backend {text!r} is not one of {', '.join(BACKENDS)}, or cpu:INSTRUCTION_SET")
        return cls(backend, isa or None)


_request: ContextVar[Request | None] = ContextVar("backend", default=None)


def requested() -> Request:
    """What `use_backend`, or else the environment variable ``DEEPSEEK_MOE_BACKEND`` at its first use, asks for."""
    request = _request.get()
    return request if request is not None else _from_environment()


@cache
def _from_environment() -> Request:
    return Request.parse(os.environ.get(ENVIRONMENT) or AUTO)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run this package's operations on one backend: ``"reference"``, ``"cpu"``, ``"cpu:avx2"``, ``"triton"``, ``"auto"``.

    The name of a library (``"deep_gemm"``, ``"liger"``, ``"flash_attention_3"``, ``"flash_attention_4"``) insists on it in the operations
    that may be its own, however long it takes; all others run as they would anyway.

    Raises:
        ValueError: no such backend.
        BackendError: a library of which nothing is called; or from an operation inside, where the backend cannot run: it names
            the operation and the reason.
    """
    token = _request.set(Request.parse(name))
    try:
        yield
    finally:
        _request.reset(token)


@torch.compiler.assume_constant_result
def requested_backend() -> str:
    """The backend of `requested`; a graph that is compiled keeps the one of that moment."""
    return requested().backend


def choose(operation: str, reasons: dict[str, str | None]) -> str:
    """The backend to run ``operation`` on.

    Args:
        reasons: for each backend that the operation has, in order of preference, why it cannot run (``None``: it
            can). The reference is implied, last.
    """
    wanted = requested_backend()
    if torch.compiler.is_exporting():  # exported programs run where this package is not
        return REFERENCE
    if wanted == AUTO or (wanted in LIBRARIES and wanted not in reasons):
        return next((backend for backend, reason in reasons.items() if reason is None), REFERENCE)
    if wanted == REFERENCE:
        return REFERENCE
    reason = reasons.get(wanted, f"has no {operation}")
    if reason is not None:
        raise BackendError(f"{operation}: backend {wanted!r} {reason}")
    return wanted


def may_use(backend: str, reason: str | None) -> bool:
    """Whether to run an operation on ``backend`` in place of the smaller ones that it stands for, which all can run."""
    return reason is None and not torch.compiler.is_exporting() and requested_backend() in (AUTO, backend, *LIBRARIES)


def takes(library: str, operation: str, find_reason: Callable[[], str | None]) -> bool:
    """Whether an operation's own kernels leave it to a library.

    Args:
        find_reason: says why the library is not to be taken (``None``: it is); asked only where it may be.

    Raises:
        BackendError: it was asked for by name, and cannot be called.
    """
    wanted = requested_backend()
    if wanted not in (AUTO, *LIBRARIES) or torch.compiler.is_exporting():
        return False
    reason = find_reason()
    if wanted == library and reason is not None:
        raise BackendError(f"{operation}: backend {library!r} {reason}")
    return reason is None


def insists_on(library: str) -> bool:
    """Whether that library was asked for by name."""
    return requested_backend() == library
