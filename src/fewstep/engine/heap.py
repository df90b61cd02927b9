"""Keep memory that an update on a CPU frees, for the next update.

An update frees hundreds of MB and the next one wants them again. glibc gives the top of its heap back to the system each
time, which then clears and maps every page anew: up to a tenth of an iteration, for no smaller peak.
"""

from __future__ import annotations

import ctypes
import platform

from fewstep.core.env import allocator_is_set

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 * 2**20
"""Largest block, in bytes, that lies on the heap; the greatest value that glibc's own moving threshold reaches."""


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees. Does nothing without glibc, or if the user has set the allocator."""
    if platform.libc_ver()[0] == "glibc" and not allocator_is_set():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
