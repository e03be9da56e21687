"""Memory that is given back and asked for again a moment later."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_MMAP = 32 << 20  # the greatest that it takes
_DEFAULT = 128 << 10
_NEVER = 2**31 - 1


@contextmanager
def kept_for_reuse() -> Iterator[None]:
    """Have the allocator keep what is freed for as long as this context lasts; where it is not glibc's, nothing.

    Slab after slab asks for arrays of the same sizes. Given back to the kernel in between, each page is cleared and
    mapped anew: a third of the time of attributing a long run.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MOST_MMAP)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT)
        libc.malloc_trim(0)
