"""Multiple-choice items from held-out text: which of four continuations is the true one?"""

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from qlib.errors import UserError

__all__ = ["Level", "LEVELS", "Item", "build_items", "cut_windows"]


@dataclass(frozen=True)
class Level:
    """A difficulty: the fewer tokens a continuation has, the harder it is to tell from the others."""

    name: str
    context: int
    continuation: int


#: Frozen with `reference-1`; hardest first. The headline is the hardest at which the baseline exceeds 85 %.
LEVELS = (Level("hard", 48, 4), Level("medium", 48, 8), Level("easy", 48, 16))
CHOICES = 4
SLOTS = 6  # items of one document, at most: two of each level


@dataclass(frozen=True)
class Item:
    """One question. The true continuation is the first of `options`; all have the same number of tokens."""

    document: int
    level: int
    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


def build_items(documents: Sequence[Sequence[int]], seed: int, limit: int | None = None) -> list[Item]:
    """Draw items from token ids of documents; passages of one document never overlap.

    The three false continuations come from elsewhere in the same document: from other documents even a poor model
    tells them apart by topic. Levels take turns, so that each gets a third of the items.

    Args:
        limit: at most so many items, spread evenly over documents; None: all.

    Raises:
        UserError: no document is long enough.
    """
    span = max(level.context + level.continuation for level in LEVELS)
    generator = np.random.default_rng(seed)
    items = []
    for number, ids in enumerate(documents):
        slots = min(len(ids) // span, SLOTS)
        if len(ids) < 4 * span:
            continue
        starts = generator.permutation(len(ids) // span)[:slots] * span
        for turn, start in enumerate(starts):
            items.append(_draw(ids, int(start), number, (number + turn) % len(LEVELS), generator))
    if not items:
        raise UserError(f"evaluation.text: no document holds the {4 * span} tokens that an item needs")
    if limit is not None and limit < len(items):
        items = [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]
    return items


def _draw(ids: Sequence[int], start: int, document: int, level: int, generator: np.random.Generator) -> Item:
    context, length = LEVELS[level].context, LEVELS[level].continuation
    split = start + context
    true = tuple(ids[split : split + length])
    options = [true]
    while len(options) < CHOICES:
        at = int(generator.integers(0, len(ids) - length))
        other = tuple(ids[at : at + length])
        # A passage that touches the question, or says the same, would make two answers right.
        if (at + length <= start or at >= split + length) and other not in options:
            options.append(other)
        elif generator.random() < 0.01:  # a document that repeats itself: take a neighbour of the true text
            options.append(tuple(np.roll(true, len(options)).tolist()))
    return Item(document, level, tuple(ids[start:split]), tuple(options))


def cut_windows(documents: Sequence[Sequence[int]], length: int, per_document: int = 2) -> list[tuple[int, list[int]]]:
    """Windows of at most `length` tokens for perplexity, spread evenly over each document: (document, ids)."""
    windows = []
    for number, ids in enumerate(documents):
        count = min(per_document, max(len(ids) // length, 1))
        for part in range(count):
            room = max(len(ids) - length, 0)
            start = round(room * (part + 1) / (count + 1))
            windows.append((number, list(ids[start : start + length])))
    return [(number, ids) for number, ids in windows if len(ids) > 1]
