"""Freed memory is kept for the next tensor, where the C library's allocator lets us ask for it.

glibc gives large blocks back to the system at once, and every tensor of some megabytes then costs a
page fault for each 4 KB of it: at a training step's sizes more time than the arithmetic on them.
"""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""
MOST = 2**31 - 1
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_pages() -> bool:
    """Let this process keep what it once had; whether it will.

    Not where the user has set the allocator up in the environment, nor with another C library.
    """
    if any(name in os.environ for name in SETTINGS) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False
        results = [library.mallopt(key, MOST) for key in (TRIM_THRESHOLD, MMAP_THRESHOLD)]
    except (AttributeError, OSError, TypeError):  # No such library, or none that can be opened.
        return False
    return all(results)
