"""Which backend runs an operation: the one place where that is decided, and that can say why.

Each operation asks `choose` with its backends in order of preference and, for each, the reason why it cannot run on
these very arguments (``None``: it can). ``auto`` takes the first that can; a backend asked for by name runs or raises.
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)
AUTO, REFERENCE, CPU, TRITON = "auto", "reference", "cpu", "triton"
BACKENDS = (AUTO, REFERENCE, CPU, TRITON)
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
        """``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, or ``"cpu:avx2"`` with an instruction set."""
        backend, _, isa = text.partition(":")
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

    Raises:
        ValueError: no such backend.
        BackendError: from an operation inside, where the backend cannot run; it names the operation and the reason.
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
    if wanted == AUTO:
        return next((backend for backend, reason in reasons.items() if reason is None), REFERENCE)
    if wanted == REFERENCE:
        return REFERENCE
    reason = reasons.get(wanted, f"has no {operation}")
    if reason is not None:
        raise BackendError(f"{operation}: backend {wanted!r} {reason}")
    return wanted


def may_use(backend: str, reason: str | None) -> bool:
    """Whether to run an operation on ``backend`` in place of the smaller ones that it stands for, which all can run."""
    return reason is None and not torch.compiler.is_exporting() and requested_backend() in (AUTO, backend)
