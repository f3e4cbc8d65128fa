"""What a benchmark reports: a figure, what it should be, and whether its interval says that it is."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlib.evaluate.timing import median_interval

__all__ = ["Row", "judge", "missing", "time_ratio"]


@dataclass(frozen=True)
class Row:
    """One target, or the answer to a question.

    Attributes:
        name: what was compared, e.g. ``gptq int4: speed over llm-compressor``. target: with its sense, e.g. ``>= 1.5``;
            empty: there is none.
        measured: None if it could not be measured; `how` then says why. low, high: its 95 % interval, where one is known.
        unit: ``times`` for ratios of time, ``fraction``, ``seconds``, ``ratio``.
        met: whether the interval's bad end meets the target; None if the target lies inside ("not resolved"), or
            there is none.
        how: settings, versions and counts in one line.
        facts: what tables need besides, by name.
    """

    name: str
    target: str
    measured: float | None
    unit: str
    met: bool | None
    low: float | None = None
    high: float | None = None
    how: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def judge(name: str, target: str, measured: float | tuple[float, float, float], unit: str, how: str) -> Row:
    """Hold a figure, or value, low and high, against a target.

    Args:
        target: ``>= 1.5`` or ``<= 1.2``: met if the whole interval is there; ``not above 1``: met unless the whole interval
            is above.
    """
    value, low, high = measured if isinstance(measured, tuple) else (measured, measured, measured)
    sense, _, limit = target.rpartition(" ")
    bound = float(limit)
    met = {
        ">=": True if low >= bound else False if high < bound else None,
        "<=": True if high <= bound else False if low > bound else None,
        "not above": low <= bound,
    }[sense]
    return Row(name, target, value, unit, met, low, high, how)


def missing(name: str, target: str, unit: str, why: str) -> Row:
    """A target that could not be measured."""
    return Row(name, target, None, unit, None, how=f"not measured: {why}")


def time_ratio(slow: Any, fast: Any, seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios of two series of times from the same rounds, and its interval."""
    return median_interval(np.asarray(slow, dtype=float) / np.asarray(fast, dtype=float), seed)
