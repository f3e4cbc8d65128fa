"""What limits decoding: how fast this machine reads memory, and how large the cache is that a timing must get past."""

from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["last_level_cache", "copies_needed", "ReadProbe"]

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
#: Assumed where the system does not tell.
USUAL_CACHE = 32 * 2**20
#: Between two uses of the same bytes, this many times the last-level cache is touched.
CYCLE = 8


@lru_cache(maxsize=None)
def last_level_cache(device: torch.device = torch.device("cpu")) -> int:
    """Bytes of the largest cache of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [(path / "size").read_text().strip() for path in CACHES.glob("index*") if (path / "size").is_file()]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS), default=USUAL_CACHE)


def copies_needed(sizes: list[int], cache: int) -> int:
    """How many copies of each thing to cycle through, so that 8 times the cache is touched before one comes up again.

    Args:
        sizes: bytes that each of the things timed side by side touches.
    """
    copies = -(-CYCLE * cache // sum(sizes))
    return max(copies, 1 if min(sizes) >= CYCLE * cache else 2)


class ReadProbe:
    """Reads a buffer that no cache holds, on all threads; timed in the same rounds as what it is compared with."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = max(CYCLE * last_level_cache(device), 2**28 if device.type == "cpu" else 2**31)
        self.buffer = torch.zeros(self.bytes // 4, dtype=torch.float32, device=device)

    def __call__(self) -> torch.Tensor:
        return self.buffer.sum()

    def gigabytes_per_second(self, milliseconds):
        """Bandwidth from the time of a call (a number or an array)."""
        return self.bytes / 1e6 / milliseconds
