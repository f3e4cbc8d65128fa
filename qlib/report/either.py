"""A better start and training: is having both better than either alone? Strategies are paired by their recipes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qlib.report.book import Book, Entry
from qlib.report.html import Column, Table
from qlib.report.pairs import interval_of, sign, together
from qlib.report.relations import TRAINING, recipe_of, untrained_of
from qlib.report.show import table

__all__ = ["Both", "found_both", "either_table", "either_words"]

PLAIN = "rtn"  # the start that costs nothing
GRID = ("element", "bits", "group_size", "symmetric")


@dataclass(frozen=True)
class Both:
    """A solver followed by training, and each alone.

    Attributes:
        entry: both. untrained: the solver alone. plain: the same training after round-to-nearest to the same grid.
        ratios: perplexity of `entry` over that of `untrained` and of `plain`, paired; None where they cannot be.
    """

    entry: Entry
    untrained: Entry
    plain: Entry
    ratios: tuple[dict | None, dict | None]


def found_both(book: Book, model: str | None = None) -> list[Both]:
    """Every strategy of a solver and one training, of which both parts were measured."""
    measured = [entry for entry in book.of(model) if entry.measurements]
    plain = {_course(entry): entry for entry in measured if _solver(entry) == PLAIN}
    found = []
    for entry in measured:
        if _solver(entry) in (None, PLAIN):
            continue
        untrained, other = untrained_of(book, entry), plain.get(_course(entry))
        if untrained and other:
            found.append(Both(entry, untrained, other, (_ratio(entry, untrained), _ratio(entry, other))))
    return found


def _solver(entry: Entry) -> str | None:
    """The first pass of a recipe of two, of which the second trains."""
    recipe = recipe_of(entry)
    return str(recipe[0].get("pass")) if len(recipe) == 2 and recipe[1].get("pass") == TRAINING else None


def _course(entry: Entry) -> tuple[Any, ...]:
    """Grid and training: what strategies must have in common."""
    solved, trained = recipe_of(entry)
    place = (entry.model, entry.device, entry.params.get("seed"))
    return (*place, *(str(solved.get(name)) for name in GRID), str(sorted(trained.items(), key=str)))


def _ratio(entry: Entry, other: Entry) -> dict | None:
    samples = together([entry, other])
    return samples and interval_of(np.exp(samples[0].nats - samples[1].nats), "ratio", samples[0].documents)


def either_table(book: Book, model: str | None = None) -> Table:
    """Perplexity of both, of each alone, and the paired ratios."""
    columns: list[str | Column] = ["Strategy", "Perplexity"]
    columns += [Column(title, "", "Alone") for title in ("Without training", "Training from rtn")]
    columns += [Column(title, "", "Both over it, paired") for title in ("Without training", "Training from rtn")]
    rows = []
    for found in found_both(book, model):
        entries = (found.entry, found.untrained, found.plain)
        rows.append([found.entry.name, *(entry.measure("quality.perplexity") for entry in entries), *found.ratios])
    caption = (
        "A solver followed by training, and each alone: the solver without training, and the same training after "
        "round-to-nearest to the same grid. A ratio below 1 says that both are better. Small print: 95 % intervals, drawn over "
        "documents."
    )
    return table(columns, rows, caption, "either")


def either_words(book: Book) -> str:
    """In how many pairs both beat each part alone; by the intervals."""
    pairs = found_both(book)
    if not pairs:
        return "Whether a solver and training together beat either alone has not been measured yet."
    said = []
    for at, part in enumerate(("the solver alone", "the same training after round-to-nearest")):
        known = [found.ratios[at] for found in pairs if found.ratios[at]]
        signs = [sign({end: ratio[end] - 1 for end in ("low", "high")}) for ratio in known]
        rest = [f"loses in {signs.count(1)}" if 1 in signs else "", f"{signs.count(0)} not resolved" if 0 in signs else ""]
        beside = f" ({', '.join(filter(None, rest))})" if any(rest) else ""
        said.append(f"{part} in {signs.count(-1)} of {len(known)}{beside}")
    return f"A solver followed by training beats {said[0]}, and {said[1]}."
