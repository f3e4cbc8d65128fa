"""GPTQ of true 72B layers from disk to disk: peak memory within a limit, whatever the depth; half an hour."""

from pathlib import Path

from qlib.bench.bench_stream import measure_methods
from qlib.bench.rows import Row

__all__ = ["measure"]


def measure(root: Path) -> list[Row]:
    """Peak memory with 3 and with 6 layers."""
    return measure_methods(root, ("GPTQ int4",))
