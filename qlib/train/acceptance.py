"""Is a model a fit quality subject? It must react to compression, and its items must be neither too hard nor too easy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlib.compress import compress
from qlib.evaluate.statistics import paired_interval, resample
from qlib.evaluate.verb import evaluate
from qlib.models.load import load

__all__ = ["Acceptance", "accept"]

WIDTHS = (8, 4, 3, 2)
GROUP = 128
BAND = (85.0, 97.0)  # percent: where the baseline's accuracy must lie at one level


@dataclass(frozen=True)
class Acceptance:
    """What was found.

    Attributes:
        rows: bits (16 for the baseline), perplexity, accuracy; and the perplexity ratio to the row above with its
            paired interval.
        levels: accuracy of the baseline by difficulty.
        separated: whether 8, 4, 3 and 2 bits differ from each other (8 bits need not differ from the baseline).
        in_band: whether one level's accuracy lies in `BAND`.
    """

    rows: list[dict[str, Any]]
    levels: list[dict[str, Any]]
    separated: bool
    in_band: bool


def accept(folder: Path | str, evaluation: Any, seed: int = 0) -> Acceptance:
    """Round a model to 8, 4, 3 and 2 bits in groups of 128 and see whether the scorer tells the results apart."""
    baseline = evaluate(load(str(folder)), evaluation, against=None, seed=seed)
    rows, before = [_row(16, baseline)], baseline.details["items"]
    for bits in WIDTHS:
        rounded = compress(load(str(folder)), [{"pass": "rtn", "bits": bits, "group_size": GROUP}], seed=seed)
        quality = evaluate(rounded, evaluation, seed=seed)
        items = quality.details["items"]
        ratio, low, high = _ratio(items, before, evaluation.bootstrap, seed)
        rows.append(_row(bits, quality) | {"ratio": ratio, "low": low, "high": high})
        before = items
    levels = baseline.details["levels"]
    return Acceptance(
        rows,
        levels,
        separated=all(row["low"] > 1 for row in rows[2:]),
        in_band=any(BAND[0] <= level["value"] <= BAND[1] for level in levels),
    )


def _row(bits: int, quality: Any) -> dict[str, Any]:
    found = quality.measurements
    return {
        "bits": bits,
        "perplexity": found["quality.perplexity"].value,
        "accuracy": found["quality.accuracy"].value,
        "ratio": None,
        "low": None,
        "high": None,
    }


def _ratio(items: dict, before: dict, times: int, seed: int) -> tuple[float, float, float]:
    """How much perplexity grew from one row to the next, document by document."""
    tokens = items["document_tokens"].astype(float)
    draws = resample(len(tokens), times, seed)
    return paired_interval(
        items["document_nll"], before["document_nll"], tokens, draws, lambda a, b: np.exp(a - b)
    )
