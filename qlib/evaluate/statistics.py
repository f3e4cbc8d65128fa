"""Intervals by bootstrap over documents, alone and paired."""

import numpy as np

__all__ = ["resample", "ratio_interval", "paired_interval"]


def resample(documents: int, times: int, seed: int) -> np.ndarray:
    """How often each document is drawn in each of `times` resamples: counts `[times, documents]`.

    Documents, not tokens or items, are resampled, because what stands in one document hangs together. The same
    arguments give the same draws, so that figures of two strategies can be paired.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=times)


def ratio_interval(
    totals: np.ndarray, counts: np.ndarray, draws: np.ndarray, transform=lambda x: x, level: float = 0.95
) -> tuple[float, float, float]:
    """Value and percentile interval of ``transform(sum(totals) / sum(counts))``.

    Args:
        totals, counts: per document `[documents]`, e.g. negative log-likelihood and tokens.
        draws: from `resample`.
    """
    # A resample without a single item carries no information about the ratio; it is left out.
    weights = draws @ counts
    samples = transform((draws @ totals)[weights > 0] / weights[weights > 0])
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(transform(totals.sum() / counts.sum())), float(low), float(high)


def paired_interval(
    first: np.ndarray, second: np.ndarray, counts: np.ndarray, draws: np.ndarray, combine, level: float = 0.95
) -> tuple[float, float, float]:
    """Value and interval of ``combine(mean of first, mean of second)`` when both are resampled together.

    Args:
        first, second: totals per document of two strategies on the same items `[documents]`.
        combine: e.g. ``lambda a, b: a - b`` for accuracies, ``lambda a, b: np.exp(a - b)`` for perplexities.
    """
    weights = draws @ counts
    held = weights > 0
    samples = combine((draws @ first)[held] / weights[held], (draws @ second)[held] / weights[held])
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    total = counts.sum()
    return float(combine(first.sum() / total, second.sum() / total)), float(low), float(high)
