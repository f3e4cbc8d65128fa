"""Sums per document of one subject and the baseline on the same items and windows, and the figures made of them."""

from typing import Any, Sequence

import numpy as np

from qlib.evaluate.baseline import Answers
from qlib.evaluate.items import LEVELS, Item
from qlib.evaluate.statistics import paired_interval, ratio_interval
from qlib.record import Measurement

__all__ = ["Tally", "measured", "HEADLINE"]

HEADLINE = 0.85  # the headline level is the hardest at which the baseline answers more than this share
BOOTSTRAP = "bootstrap over documents"
CUT = {"line": "cut at a line's end", "any": "cut anywhere", "word": "cut inside a word"}


def measured(triple: tuple[float, float, float], unit: str, n: int, method: str, conditions: str = "") -> Measurement:
    """A value with its interval as a measurement."""
    value, low, high = triple
    return Measurement(value, unit, int(n), low, high, method, conditions)


class Tally:
    """Compares a subject with the baseline.

    Args:
        windows: (document, ids) of each window.
        draws: resampled documents `[times, documents]`.
    """

    def __init__(self, items: Sequence[Item], windows: Sequence[tuple], own: Answers, base: Answers, draws: np.ndarray):
        self.own, self.base, self.draws, self.documents = own, base, draws, draws.shape[1]
        self.document = np.array([item.document for item in items])
        self.level = np.array([item.level for item in items])
        self.window_document = np.array([number for number, _ in windows])
        self.right = _right(own)
        self.base_right = _right(base)
        reached = [self.base_right[self.level == level].mean() > HEADLINE for level in range(len(LEVELS))]
        #: the hardest level the baseline masters; the easiest if it masters none
        self.headline = reached.index(True) if any(reached) else len(LEVELS) - 1

    def measurements(self, text_bytes: int) -> dict[str, Measurement]:
        """Accuracy, perplexity and bits per byte of the subject alone; `text_bytes` is the size of the scored text."""
        level = LEVELS[self.headline]
        accuracy, n = self._accuracy(self.headline)
        nll, tokens = self._sums(self.own)
        # Tokens per byte is a constant of the text, so the same resamples serve both figures.
        per_byte = tokens.sum() / text_bytes / np.log(2)
        perplexity = ratio_interval(nll, tokens, self.draws, np.exp)
        bits = ratio_interval(nll, tokens, self.draws, lambda nats: nats * per_byte)
        count = tokens.sum()
        return {
            "quality.accuracy": measured(
                accuracy,
                "percent",
                n,
                f"true continuation among four, likelihood relative to the unconditional one; {BOOTSTRAP}",
                f"level {level.name}: {level.continuation} tokens behind {level.context}, {CUT[level.cut]}; chance 25 %",
            ),
            "quality.perplexity": measured(
                perplexity, "perplexity", count, f"exp of the mean negative log-likelihood per token; {BOOTSTRAP}"
            ),
            "quality.bits_per_byte": measured(bits, "bits", count, "the same likelihood over the bytes of the text"),
        }

    def against_baseline(self) -> dict[str, Measurement]:
        """Differences from the baseline, item by item and window by window."""
        chosen = self.level == self.headline
        counts = self._per_document(np.ones(len(chosen)), chosen)
        own, base = (self._per_document(right.astype(float), chosen) for right in (self.right, self.base_right))
        delta = paired_interval(own, base, counts, self.draws, lambda a, b: 100 * (a - b))
        nll, tokens = self._sums(self.own)
        ratio = paired_interval(nll, self._sums(self.base)[0], tokens, self.draws, lambda a, b: np.exp(a - b))
        method = f"against the bf16 baseline on the same text, paired; {BOOTSTRAP}"
        return {
            "quality.accuracy_delta": measured(delta, "points", chosen.sum(), method),
            "quality.perplexity_ratio": measured(ratio, "ratio", tokens.sum(), method),
        }

    def levels(self) -> list[dict[str, Any]]:
        """Accuracy at every difficulty."""
        rows = []
        for index, level in enumerate(LEVELS):
            if (self.level == index).any():
                (value, low, high), n = self._accuracy(index)
                figures = {"value": value, "low": low, "high": high, "n": n}
                rows.append({"level": level.name, "cut": CUT[level.cut], "context": level.context, "continuation": level.continuation} | figures)
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """What paired statistics need later: scores per item, likelihood per document."""
        nll, tokens = self._sums(self.own)
        return {
            "item_document": self.document.astype(np.int32),
            "item_level": self.level.astype(np.int8),
            "item_inside": self.own.inside.astype(np.float32),
            "item_alone": self.own.alone.astype(np.float32),
            "document_nll": nll,
            "document_tokens": tokens.astype(np.int32),
        }

    def _accuracy(self, level: int) -> tuple[tuple[float, float, float], int]:
        chosen = self.level == level
        counts = self._per_document(np.ones(len(chosen)), chosen)
        totals = self._per_document(self.right.astype(float), chosen)
        return ratio_interval(totals, counts, self.draws, lambda share: 100 * share), int(chosen.sum())

    def _per_document(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(self.document[chosen], values[chosen], minlength=self.documents)

    def _sums(self, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood and tokens per document `[documents]`."""
        bins = self.window_document
        nll, tokens = (np.bincount(bins, x, minlength=self.documents) for x in (answers.nll, answers.tokens))
        return nll, tokens


def _right(answers: Answers) -> np.ndarray:
    """Whether the true option (the first) gains most from its context `[items]`; a tie is no answer."""
    gain = answers.inside - answers.alone
    return gain[:, 0] > gain[:, 1:].max(axis=1)
