"""Hand freed memory back to the system at once: the opposite of `qlib.allocator`, where memory is shorter than time.

Otherwise glibc keeps what it may need again between blocks in use, and a stream takes up to twice what it needs. (Not in
that module because all that compress a model in memory depend on it.)
"""

import ctypes

__all__ = ["return_freed_memory"]

#: Parameters of glibc's mallopt. Blocks from 1 MiB on come from the system and go back to it.
SETTINGS = {-3: 2**20, -1: 2**20, -2: 0}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def return_freed_memory() -> bool:
    """Ask the C library for it, for the whole process; false where it knows no such thing (musl, macOS)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in SETTINGS.items())
