"""A kernel that does nothing: whether Triton can start one is found with it."""

import triton


@triton.jit
def nothing():
    """Starts and ends."""
