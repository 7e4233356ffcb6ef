"""The C library's allocator, told to keep what it has."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt parameters, and the largest threshold it takes
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, LARGEST = -1, -2, -3, 32 * 2**20


def keep_pages(spare: int = 256 * 2**20) -> bool:
    """Reuse freed memory instead of handing it back to the system; returns whether the allocator could be told.

    Training frees and takes the same large tensors at every step. By default glibc maps and unmaps each, and the system
    clears every page again: tens of thousands of page faults a step, often more than the arithmetic. On other systems
    nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without it
        return False
    return all(mallopt(name, value) for name, value in ((MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, 2**30), (TOP_PAD, spare)))
