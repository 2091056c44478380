"""Kernel libraries of others that a machine may have, and what this package does with them: it tells, and calls none but torch's.

Their calls differ from release to release, and none could be tried here on a card that it is for. So what is used is this
package's own kernels and torch's, and the log says, once for each card, which are used and what lies idle.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from transformers.utils import logging

logger = logging.get_logger(__name__)


class Library(NamedTuple):
    """``packages``: names under which it is installed. ``oldest``, ``latest``: the cards that it is for, 90 for SM90."""

    name: str
    packages: tuple[str, ...]
    purpose: str
    oldest: int
    latest: int = 999


LIBRARIES = (
    Library("DeepGEMM", ("sgl-deep-gemm", "deep-gemm"), "FP8 products", 90, 109),
    Library("FlashMLA", ("sgl-flash-mla", "flash-mla"), "latent attention", 90, 109),
    Library("humming", ("humming-kernels",), "products of few-bit weights", 75),
    Library("Liger", ("liger-kernel",), "norms, SwiGLU and losses", 80),
    Library("FlashAttention 3", ("flash-attn-3",), "attention over prompts", 90, 90),
    Library("FlashAttention 4", ("flash-attn-4",), "attention over prompts", 90),
)


def installed(packages: tuple[str, ...]) -> str | None:
    """The version of the first of them that is there; nothing is imported."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def unused(card: int) -> list[str]:
    """Of each library that is installed: its name and version, and why it is not used on a card."""
    found = []
    for library in LIBRARIES:
        release = installed(library.packages)
        if release is not None:
            runs = library.oldest <= card <= library.latest
            reason = f"for {library.purpose}, not tested here" if runs else f"is not for SM{card}"
            found.append(f"{library.name} {release} ({reason})")
    return found


@cache
def announce(device: str, card: int) -> None:
    """One line in the log, once for each device: what computes there, and what is installed and does not."""
    idle = unused(card)
    rest = f"; installed and not used: {', '.join(idle)}" if idle else ""
    logger.info(f"{device} (SM{card}): this package's kernels, by Triton {installed(('triton',))}, and torch's{rest}")
