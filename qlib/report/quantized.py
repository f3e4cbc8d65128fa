"""Quantized strategies by width and by method, told from records and recipes, as tables and sentences want them."""

import numpy as np

from qlib.report import numbers
from qlib.report.book import Book, Entry
from qlib.report.measures import family_label

__all__ = ["METHODS", "SPLIT", "group_of", "width_of", "heading", "arranged", "by_width", "method_words"]

#: Group of methods -> its passes. A recipe of several belongs to the last group that has one of its passes.
METHODS = {
    "rounding": ("rtn",),
    "gptq": ("gptq", "autogptq"),
    "transforms": ("awq", "hqq", "smooth", "rotate"),
    "learned": ("signround", "distil"),
    "cache": ("kv_cache",),
    "tool": ("tool",),
}
SPLIT = ("weight_quantization", "tool")  # families large enough for a heading per width
MANY, FULL = 5, 16  # from `MANY` bits on, widths share a figure; at `FULL` the weights are not compressed


def group_of(entry: Entry) -> str:
    """The group of methods that a recipe belongs to, or an empty string."""
    passes = {step.get("pass") for step in entry.params.get("recipe") or [] if isinstance(step, dict)}
    return next((group for group in reversed(METHODS) if passes & set(METHODS[group])), "")


def width_of(entry: Entry) -> int | None:
    """Whole bits of a weight, without what scales and zeros add; None if it was not measured."""
    bits = numbers.number(entry.measure("size.bits_per_weight"))
    return None if bits is None else int(bits + 0.01)


def heading(entry: Entry, short: bool = False) -> str:
    """What stands above an entry in a table: its family, and its width where the family is large.

    Args:
        short: without the family, which the table is about; an empty string where there is nothing else.
    """
    family = family_label(entry.family)
    if entry.family not in SPLIT:
        return "" if short else family
    width = width_of(entry)
    words = "not measured" if width is None else "weights not compressed" if width >= FULL else f"{width} bits"
    return words[:1].upper() + words[1:] if short else f"{family}, {words}"


def arranged(entries: list[Entry]) -> list[Entry]:
    """The same order, but large families from many bits to few and, within a width, from low perplexity to high."""
    families = list(dict.fromkeys(entry.family for entry in entries))

    def place(entry: Entry) -> tuple:
        perplexity = numbers.number(entry.measure("quality.perplexity"))
        own = (-(width_of(entry) or 0), perplexity or np.inf) if entry.family in SPLIT else ()
        return families.index(entry.family), *own

    return sorted(entries, key=place)


def by_width(book: Book, model: str | None = None) -> dict[str, Book]:
    """Parts of the book that hold the weight quantization of one width each, or of all large widths together."""
    widths = {min(width_of(e), MANY) for e in book.of(model, SPLIT[0]) if width_of(e)}

    def part(width: int) -> Book:
        return book.part(lambda e: min(width_of(e) or 0, MANY) == width)

    return {f"{w} bits{' or more' * (w == MANY)}": part(w) for w in sorted(widths, reverse=True)}


def method_words(book: Book, group: str) -> str:
    """The lowest perplexity that a group of methods reaches at each width; of caches, what each holds."""
    entries = [e for family in SPLIT for e in book.of(family=family) if group_of(e) == group]
    entries = [e for e in arranged(entries) if numbers.number(e.measure("quality.perplexity")) is not None]
    if not entries:
        return "None has been measured yet."
    if group == "cache":
        return f"{'; '.join(_cache_words(book, entry) for entry in entries)}."
    best: dict[int, Entry] = {}
    for entry in entries:
        best.setdefault(width_of(entry) or FULL, entry)
    narrow = {width: entry for width, entry in best.items() if width < MANY} or best
    return f"Best {'; '.join(f'with {width} bits is {_quality(entry)}' for width, entry in narrow.items())}."


def _quality(entry: Entry) -> str:
    perplexity, ratio = (entry.measure(f"quality.{name}") for name in ("perplexity", "perplexity_ratio"))
    return f"{entry.name}, perplexity {numbers.write(perplexity, 'value')}, {numbers.write(ratio)} the baseline's"


def _cache_words(book: Book, entry: Entry) -> str:
    ratio = numbers.write(entry.measure("quality.perplexity_ratio"))
    held, whole = (numbers.write(e and e.measure("size.kv_bytes_per_token")) for e in (entry, book.baseline(entry)))
    return f"{entry.name} holds {held} for each token, against {whole}, at {ratio} the baseline's perplexity"
