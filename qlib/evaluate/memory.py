"""Peak anonymous memory of this process while a block of code runs."""

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

__all__ = ["anonymous_bytes", "track_peak", "Peak"]

STATUS = Path("/proc/self/status")


class Peak:
    """Holds the highest sample, in bytes."""

    def __init__(self) -> None:
        self.bytes = anonymous_bytes()


def anonymous_bytes() -> int:
    """Resident anonymous memory; mapped files are not memory use. Falls back to all resident memory off Linux."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


@contextmanager
def track_peak(interval: float = 0.02) -> Iterator[Peak]:
    """Sample memory in a thread every `interval` seconds and keep the highest value."""
    peak, stop = Peak(), threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            peak.bytes = max(peak.bytes, anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.bytes = max(peak.bytes, anonymous_bytes())
