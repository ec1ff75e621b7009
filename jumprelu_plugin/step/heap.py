"""Returns free memory in the C library's heap to the system before a large allocation.

A step allocates and frees many blocks of a few megabytes. glibc keeps freed blocks for reuse, and
those that fit no later block stay in the heap: 60 to 100 MB at (d_in 2304, d_sae 16384, batch
4096), in addition to the gradients. glibc has a function that returns them; PyTorch has none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

# From 2**25 bytes on (the largest M_MMAP_THRESHOLD), glibc allocates a block from the system and
# never from free memory in the heap. Up to twice that size, returning memory costs more than it
# saves (4 % of a step at d_in 768, d_sae 12288).
LARGE_BYTES = 2**26


def make_room(size: int) -> None:
    """Return free memory to the system if at least `LARGE_BYTES` are about to be allocated.

    Does nothing if the C library is not glibc.

    Args:
        size: bytes of the next allocation.
    """
    if size >= LARGE_BYTES:
        _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # the C library is not glibc
        return lambda _: None
