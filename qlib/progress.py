"""Progress that suits where it is read: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Iterator

__all__ = ["progress", "clock", "silence"]

_silent = False


def silence() -> None:
    """Tell nothing from now on: in a process whose parent tells how far the whole is."""
    global _silent
    _silent = True


def clock(seconds: float) -> str:
    """Format a duration: ``8 s``, ``3 min 05 s``, ``1 h 12 min``."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def progress(start: int, stop: int, label: str, every: float = 30.0) -> Iterator[int]:
    """Yield ``start .. stop - 1`` and tell how far the loop is and how long it will take.

    `every` is the least number of seconds between two plain lines.
    """
    if _silent:
        yield from range(start, stop)
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(range(start, stop), desc=label, initial=start, total=stop, file=sys.stderr)
        return
    begun = last = time.perf_counter()
    for index in range(start, stop):
        yield index
        now, done = time.perf_counter(), index + 1 - start
        if now - last >= every:
            left = (now - begun) / done * (stop - start - done)
            print(f"{label}: {index + 1}/{stop}, {clock(left)} left", file=sys.stderr, flush=True)
            last = now
