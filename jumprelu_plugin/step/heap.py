"""Memory that is free inside the C library's heap, handed back before a large allocation.

A step makes and drops many blocks of a few megabytes. glibc keeps what is dropped for the next
block, and what does not fit the next block stays: 60 to 100 MB at (d_in 2304, d_sae 16384, batch
4096), on top of the gradients. PyTorch has no function for it, glibc does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

# From 2**25 bytes on, glibc takes a block straight from the system (its largest M_MMAP_THRESHOLD),
# never from what is free in the heap. Up to twice that, there is less to hand back than it costs
# (4 % of a step at d_in 768, d_sae 12288).
LARGE_BYTES = 2**26


def make_room(size: int) -> None:
    """Hand free memory back to the system if `size` bytes, about to be allocated, are many.

    Does nothing where the C library is not glibc.
    """
    if size >= LARGE_BYTES:
        _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; no such function; no such library
        return lambda _: None
