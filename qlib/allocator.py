"""Keep freed memory in the process instead of handing it back to the system and asking for it again a moment later.

glibc returns every freed block above some size at once; the next tensor of that size then costs a page fault for each of
its pages, which for activations of a few megabytes takes several times longer than computing them.
"""

import ctypes

__all__ = ["keep_freed_memory"]

#: Parameters of glibc's mallopt. Blocks of up to 32 MiB, the most it allows, come from the heap, which is not trimmed.
SETTINGS = {-3: 32 * 2**20, -1: 2**31 - 1, -2: 64 * 2**20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> bool:
    """Ask the C library for it, for the whole process; false where it knows no such thing (musl, macOS)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in SETTINGS.items())
