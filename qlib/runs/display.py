"""How a run tells where it is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from qlib.progress import clock

__all__ = ["Line"]

WIDTH = 24


class Line:
    """Progress of one strategy on stderr.

    Args:
        name: what runs. expected: seconds it took before, None if unknown. every: seconds between plain lines.
    """

    def __init__(self, name: str, expected: float | None, every: float = 30.0):
        self.name, self.expected, self.every = name, expected, every
        self.tty = sys.stderr.isatty()
        self.last = time.monotonic()

    def update(self, seconds: float, cell: int, cells: int) -> None:
        """Show the time since the start and the cell (from 1) that runs."""
        if self.tty:
            share = min(seconds / self.expected, 0.99) if self.expected else (cell - 1) / max(cells, 1)
            bar = "#" * round(WIDTH * share)
            told = f"cell {cell}/{cells}  {clock(seconds)}{self._left(seconds)}"
            self._write(f"\r{self.name}  [{bar:-<{WIDTH}}] {told}\033[K")
        elif time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self._write(f"{self.name}: cell {cell}/{cells}, {clock(seconds)}{self._left(seconds)}\n")

    def close(self, text: str) -> None:
        """Replace the bar by what came out."""
        self._write(f"{chr(13) + chr(27) + '[K' if self.tty else ''}{text}\n")

    def _left(self, seconds: float) -> str:
        if not self.expected:
            return ""
        left = self.expected - seconds
        return f", about {clock(left)} left" if left > 0 else f", longer than the {clock(self.expected)} before"

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
