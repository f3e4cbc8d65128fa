"""How many times longer than at full rate each kind of work takes, fitted to measured runs; and how far off that is.

A run took y seconds and consists of counts a_j, seconds at full rate. Factors x_j >= 0 make sum_j a_j x_j / y as close to
1 as they can, over all runs: relative errors, squared. The band of a prediction comes from runs that were held out: each
group of runs (a shape) is predicted from all others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Run", "Fit", "fit_runs", "held_out", "spread"]

SWEEPS, ENOUGH = 20_000, 1e-10
#: Of what was held out, this share lies inside the band.
INSIDE = 0.9


@dataclass(frozen=True)
class Run:
    """One measured time.

    Attributes:
        name: what ran. group: what is held out together. columns: seconds at full rate. seconds: measured.
    """

    name: str
    group: str
    columns: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Factors by column."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, columns: Mapping[str, float]) -> float | None:
        """Time of what consists of these counts; None if one of them was in no run."""
        if any(name not in self.factors for name, count in columns.items() if count):
            return None
        return sum(self.factors[name] * count for name, count in columns.items() if count)

    def unknown(self, columns: Mapping[str, float]) -> list[str]:
        """Counts that were in no run."""
        return [name for name, count in columns.items() if count and name not in self.factors]


def fit_runs(runs: Sequence[Run]) -> Fit:
    """The factors, by coordinate descent: one after the other is set to its best value for the others, 0 at least."""
    names = sorted({name for run in runs for name, count in run.columns.items() if count})
    if not names:
        return Fit()
    shares = np.array([[run.columns.get(name, 0.0) / run.seconds for name in names] for run in runs])  # [runs, columns]
    scale = np.sqrt((shares**2).sum(0))
    shares = shares / scale
    factors, left = np.zeros(len(names)), np.ones(len(runs))  # left: 1 - shares @ factors
    for _ in range(SWEEPS):
        moved = 0.0
        for j in range(len(names)):
            better = max(0.0, factors[j] + shares[:, j] @ left)
            step = better - factors[j]
            left -= shares[:, j] * step
            factors[j], moved = better, max(moved, abs(step))
        if moved < ENOUGH:
            break
    return Fit(dict(zip(names, (factors / scale).tolist())))


def held_out(runs: Sequence[Run]) -> list[tuple[Run, float]]:
    """Every run that can be predicted from the runs of other groups, and the prediction."""
    found = []
    for group in dict.fromkeys(run.group for run in runs):
        fit = fit_runs([run for run in runs if run.group != group])
        found += [(run, seconds) for run in runs if run.group == group and (seconds := fit.seconds(run.columns))]
    return found


def spread(pairs: Sequence[tuple[float, float]]) -> float | None:
    """How far, as |log|, predictions lie from what was measured: 0.9 of (measured, predicted) are at most so far off."""
    if not pairs:
        return None
    off = sorted(abs(math.log(predicted / measured)) for measured, predicted in pairs)
    return float(np.quantile(off, INSIDE))
