"""Models of several sizes, timed alike, and the power of the number of parameters by which their times grow."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from qlib.evaluate.latency import time_formats
from qlib.evaluate.whole_model import PHASES, rounds_of
from qlib.models.shapes import find_shape
from qlib.record import Measurement

__all__ = ["time_sizes", "slopes", "slope"]

DRAWS = 2000


def time_sizes(
    models: Sequence[str], formats: Sequence[str], prompt_tokens: int, context_tokens: int, rounds: int, seed: int = 0,
    timed: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Formats of every shape, one shape after the other.

    Args:
        timed: shapes that were timed before, as `time_formats` returns them; they are not timed again.

    Returns:
        model -> parameters, conditions, measurements of each format, and milliseconds of every round by phase and format.
    """
    found = {}
    for model in models:
        shape = find_shape(model)
        one = (timed or {}).get(model) or time_formats(
            model, list(formats), prompt_tokens, context_tokens, rounds=rounds, seed=seed
        )
        counted = rounds_of(one)
        found[model] = {
            "parameters": shape.parameters,
            "conditions": one["conditions"],
            "formats": {format: one["formats"][format] for format in formats},
            "rounds": {p: {f: counted.model(shape, p, f).tolist() for f in formats} for p in PHASES},
        }
    return found


def slopes(sizes: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """phase -> format -> power of the number of parameters, as `slope` tells it; none where there is one size alone."""
    if len(sizes) < 2:
        return {}
    parameters, first = [one["parameters"] for one in sizes.values()], next(iter(sizes.values()))["rounds"]
    return {
        phase: {
            format: slope(parameters, [np.array(one["rounds"][phase][format]) for one in sizes.values()], seed)
            for format in formats
        }
        for phase, formats in first.items()
    }


def slope(parameters: Sequence[float], rounds: Sequence[np.ndarray], seed: int = 0) -> dict[str, Any]:
    """The power p of time = c x parameters^p through the medians of `rounds`, one array for each size.

    Returns:
        the fields of a measurement, its interval a bootstrap over rounds, which tells noise alone; and `farthest`: the
        factor by which the size that fits worst lies off the line.
    """
    x, random = np.log(parameters), np.random.default_rng(seed)
    medians = np.log([np.median(one) for one in rounds])
    power, start = np.polyfit(x, medians, 1)
    off = float(np.exp(np.abs(medians - (power * x + start)).max()))
    drawn = [np.log(np.median(one[random.integers(len(one), size=(DRAWS, len(one)))], axis=1)) for one in rounds]
    low, high = np.quantile(np.polyfit(x, np.array(drawn), 1)[0], [0.025, 0.975])
    method = "straight line through logarithms of medians, bootstrap over rounds"
    count, where = min(map(len, rounds)), f"{len(rounds)} sizes"
    return asdict(Measurement(float(power), "exponent", count, float(low), float(high), method, where)) | {"farthest": off}
