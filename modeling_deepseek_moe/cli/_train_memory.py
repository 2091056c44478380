"""What ``deepseek-moe train`` asks of the libraries below it: to keep less than they would."""

import ctypes
import os

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
OWN_MAPPING = 1 << 20  # bytes from which a tensor gets a mapping of its own
# Both torch's and oneDNN's lists of compiled products, 1,024 of them by default, of some 0.6 MB each with bf16.
PRODUCTS = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


def spare_memory() -> None:
    """Let large tensors go back to the system as they are freed, and few compiled products be kept; before the first product.

    glibc raises the size from which it maps memory to that of what was freed, up to 32 MiB, and keeps smaller pieces in its heap, where
    one that lives on holds all below it: a training's activations, freed in another order than they were made, took up to a third more.
    Products are compiled for their number of rows, and as many rows as an expert got hardly come again.
    """
    for name, value in PRODUCTS.items():
        os.environ.setdefault(name, value)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
