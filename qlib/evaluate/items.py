"""Multiple-choice items from held-out text: which of four continuations is the true one?"""

from dataclasses import dataclass
from typing import Literal, Mapping, Sequence

import numpy as np

from qlib.errors import UserError

__all__ = ["Level", "LEVELS", "Item", "build_items", "cut_windows"]


@dataclass(frozen=True)
class Level:
    """A difficulty: tokens of context and continuation, and where the passage is cut.

    Cut inside a word, the first letters tell much; at the end of a line, nothing does but the meaning.
    """

    name: str
    cut: Literal["line", "any", "word"]
    context: int
    continuation: int


#: Frozen with `reference-2`; hardest first. The headline is the hardest at which the baseline exceeds 85 %.
LEVELS = (Level("hard", "line", 48, 16), Level("medium", "any", 48, 16), Level("easy", "word", 48, 16))
CHOICES = 4
PASSAGES = 4  # of one document, at most
FEWEST = 8  # places of a kind that a document must have to choose from


@dataclass(frozen=True)
class Item:
    """One question. The true continuation is the first of `options`; all have the same number of tokens."""

    document: int
    level: int
    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


SPAN = max(level.context + level.continuation for level in LEVELS)


def build_items(
    documents: Sequence[Sequence[int]],
    cuts: Mapping[str, frozenset[int] | None],
    seed: int,
    limit: int | None = None,
) -> list[Item]:
    """Draw items from token ids of documents; passages of one document never overlap.

    The false continuations begin at the same kind of place elsewhere in the same document: from other documents even a
    poor model tells them apart by topic. Levels take turns, so that each gets about a third of the items.

    Args:
        documents: token ids of each, as lists or arrays.
        cuts: for each kind of cut the ids of tokens that a continuation may begin with; None: any.
        limit: at most so many items, spread evenly over documents; None: all.

    Raises:
        UserError: no document is long enough.
    """
    generator = np.random.default_rng(seed)
    begins = {kind: None if allowed is None else np.fromiter(allowed, np.int64) for kind, allowed in cuts.items()}
    items = []
    for number, document in enumerate(documents):
        ids = np.asarray(document)
        inside = np.arange(SPAN, len(ids) - SPAN)  # the start of a document is its licence, the same in many
        taken: list[int] = []
        for turn in range(PASSAGES):
            level = (number + turn) % len(LEVELS)
            allowed = begins[LEVELS[level].cut]
            places = inside if allowed is None else inside[np.isin(ids[inside], allowed)]
            item = _draw(ids, places, taken, number, level, generator) if len(places) >= FEWEST else None
            items += [item] if item else []
    if not items:
        raise UserError(f"evaluation.text: no document is longer than the {2 * SPAN + FEWEST} tokens that items need")
    if limit is not None and limit < len(items):
        items = [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]
    return items


def _draw(
    ids: np.ndarray, places: np.ndarray, taken: list[int], document: int, level: int, generator: np.random.Generator
) -> Item | None:
    """One item at a random place that keeps its distance from those `taken`, or None if the document has no room."""
    context, length = LEVELS[level].context, LEVELS[level].continuation
    order = generator.permutation(places)
    split = next((int(at) for at in order if all(abs(at - other) >= SPAN for other in taken)), None)
    if split is None:
        return None
    options = [tuple(ids[split : split + length].tolist())]
    for at in order:
        other = tuple(ids[at : at + length].tolist())
        # What touches the passage, or says the same, would make two answers right.
        if (at + length <= split - context or at >= split + length) and other not in options:
            options.append(other)
        if len(options) == CHOICES:
            taken.append(split)
            return Item(document, level, tuple(ids[split - context : split].tolist()), tuple(options))
    return None


def cut_windows(documents: Sequence[Sequence[int]], length: int, per_document: int = 1) -> list[tuple[int, list[int]]]:
    """Windows of at most `length` tokens for perplexity, spread evenly over each document: (document, ids)."""
    windows = []
    for number, ids in enumerate(documents):
        count = min(per_document, max(len(ids) // length, 1))
        for part in range(count):
            room = max(len(ids) - length, 0)
            start = round(room * (part + 1) / (count + 1))
            windows.append((number, np.asarray(ids[start : start + length]).tolist()))
    return [(number, ids) for number, ids in windows if len(ids) > 1]
