"""Strategies compared on the same documents: resampled together, so that any formula of theirs gets an interval."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Sequence

import numpy as np

from qlib.evaluate.statistics import resample
from qlib.report.book import Entry
from qlib.report.numbers import number

__all__ = ["Sample", "together", "interval_of", "sign"]

DEFAULT_DRAWS = 1000
NAMES = ("document_nll", "document_tokens", "item_document", "item_level", "item_inside", "item_alone")


@dataclass(frozen=True)
class Sample:
    """One strategy's figures on all documents (the first value) and on every resample of them `[1 + draws]`.

    Attributes:
        nats: mean negative log-likelihood per token, the logarithm of perplexity.
        accuracy: percent, at the headline level.
        documents: how many are resampled.
    """

    nats: np.ndarray
    accuracy: np.ndarray
    documents: int

    @property
    def perplexity(self) -> np.ndarray:
        return np.exp(self.nats)


def together(entries: Sequence[Entry | None]) -> list[Sample] | None:
    """The samples of strategies on the same draws.

    Args:
        entries: the first, whose headline level counts, is usually the baseline.

    Returns:
        None where one is missing, kept no scores, or was measured on other documents or items.
    """
    found = [entry and _items(entry.folder / "items.npz") for entry in entries]
    if not found or any(items is None for items in found):
        return None
    first = found[0]
    same = ("document_tokens", "item_document", "item_level")
    if not all(np.array_equal(first[name], items[name]) for items in found for name in same):
        return None
    documents = len(first["document_tokens"])
    params = entries[0].params
    times = (params.get("evaluation") or {}).get("bootstrap") or DEFAULT_DRAWS
    draws = _draws(documents, times, params.get("seed") or 0)
    level = _headline(first, number(entries[0].measure("quality.accuracy")))
    return [_sample(items, level, draws) for items in found]


@lru_cache(maxsize=2)  # a hundred pairs of a report are drawn alike
def _draws(documents: int, times: int, seed: int) -> np.ndarray:
    """Every document once, then how often each is drawn `[1 + times, documents]`."""
    draws = np.vstack([np.ones((1, documents)), resample(documents, times, seed)])
    draws.flags.writeable = False  # it is shared
    return draws


def _items(file: Path) -> dict[str, np.ndarray] | None:
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=256)
def _read(file: Path, changed: int) -> dict[str, np.ndarray] | None:
    """The scores of a file as it was when it `changed`; None if it lacks some."""
    with np.load(file) as stored:
        return {name: stored[name] for name in NAMES} if set(NAMES) <= set(stored.files) else None


def _right(items: dict[str, np.ndarray]) -> np.ndarray:
    """Whether the true option, the first, gains most from its context `[items]`."""
    gain = items["item_inside"] - items["item_alone"]
    return gain[:, 0] > gain[:, 1:].max(axis=1)


def _headline(items: dict[str, np.ndarray], accuracy: float | None) -> int:
    """The level that the record's accuracy is about: the one on which these items give it."""
    levels, right = np.unique(items["item_level"]), _right(items)
    shares = np.array([100 * right[items["item_level"] == level].mean() for level in levels])
    return int(levels[np.abs(shares - (accuracy or 0)).argmin()])


def _sample(items: dict[str, np.ndarray], level: int, draws: np.ndarray) -> Sample:
    documents = draws.shape[1]
    chosen = items["item_level"] == level
    where = items["item_document"][chosen]
    right = np.bincount(where, _right(items)[chosen], minlength=documents)
    counts = np.bincount(where, minlength=documents)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no item: left out by `interval_of`
        nats = (draws @ items["document_nll"]) / (draws @ items["document_tokens"])
        return Sample(nats, 100 * (draws @ right) / (draws @ counts), documents)


def interval_of(samples: np.ndarray, unit: str, n: int, level: float = 0.95) -> dict | None:
    """A measurement from a figure's samples `[1 + draws]`; None if the figure itself is not finite."""
    drawn = samples[1:][np.isfinite(samples[1:])]
    if not np.isfinite(samples[0]) or not len(drawn):
        return None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    method = "paired bootstrap over documents"
    return {"value": float(samples[0]), "unit": unit, "n": n, "low": float(low), "high": float(high), "method": method}


def sign(difference: dict | None) -> int:
    """1 or -1 where the whole interval is above or below zero, else 0: not resolved."""
    low, high = number(difference, "low"), number(difference, "high")
    return 0 if low is None or high is None or low <= 0 <= high else 1 if low > 0 else -1
