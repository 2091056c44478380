"""Errors that say that a device has no memory left, whoever raises them."""

import torch

TRITON = "Triton Error [CUDA]: out of memory"  # a RuntimeError's, as a kernel is loaded or started


def exhausted(error: Exception) -> str | None:
    """What an error says, if it is that a device has no memory left; the error itself holds, in its traceback, what was allocated."""
    out_of_memory = (
        isinstance(error, torch.OutOfMemoryError)
        # pinned memory, and a device whose context does not fit
        or (isinstance(error, torch.AcceleratorError) and "out of memory" in str(error))
        or TRITON in str(error)
    )
    return " ".join(str(error).split()) if out_of_memory else None
