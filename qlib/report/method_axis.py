"""Bits against loss of all quantization methods on one axis: the frame from the book, the figure, and it in words."""

import itertools
import os
from pathlib import Path

from qlib.paths import find_root
from qlib.report.axes import drawn, mark_legend, point, whiskers
from qlib.report.book import Book, Entry, collect
from qlib.report.figures import NAMES, pareto_front
from qlib.report.labels import name_points
from qlib.report.measures import family_label
from qlib.report.numbers import number
from qlib.report.record_frames import data_frame
from qlib.report.theme import HEIGHT, MARKS, OTHER, SOFT, family_mark

__all__ = ["own_book", "method_frame", "method_of", "by_method", "method_alt", "OWN"]

#: The family whose methods are told apart; another family is one method.
OWN = "weight_quantization"
QUANTIZED = (OWN, "mixed_precision", "tool")
TICKS = (0, 1, 3, 10, 30, 100, 300, 1000)  # percent
NEAR = 1.0  # percent: the axis is linear below it, logarithmic above


def own_book() -> Book:
    """The book of the runs that a notebook is one of; of the project's where it was not started by `qlib run`."""
    root, work = find_root(), os.environ.get("QLIB_RUN_DIR")  # RUNS/MODEL/DEVICE/NAME/work
    runs = Path(work).parents[3] if work else root / "reports" / "runs"
    return collect(runs, root / "reports" / "published", root / "params")


def method_of(entry: Entry) -> str:
    """The first pass of the recipe, which the method is named after; of another family its name."""
    recipe = entry.params.get("recipe") or []
    return recipe[0]["pass"] if entry.family == OWN and recipe else family_label(entry.family)


def method_frame(book: Book, model: str):
    """strategy, family, method, bits (per weight of the whole model), perplexity, growth over bf16 (%) with interval.

    The interval is paired: of the ratio to the baseline on the same documents. What stores no weight in fewer bits (the
    key-value cache alone) is left out.
    """
    rows = []
    for entry in (one for family in QUANTIZED for one in book.of(model, family)):
        ratio, own = entry.measure("quality.perplexity_ratio"), number(entry.measure("size.bits_per_weight"))
        if number(ratio) is None or own is None or own >= 16:
            continue
        row = {"strategy": entry.name, "family": entry.family, "method": method_of(entry)}
        row |= {"bits": number(entry.measure("size.bits_per_weight_total"))}
        row |= {"perplexity": number(entry.measure("quality.perplexity"))}
        for name, end in (("growth", "value"), ("growth_low", "low"), ("growth_high", "high")):
            found = number(ratio, end)
            row[name] = None if found is None else 100 * (found - 1)
        rows.append(row)
    names = ["strategy", "family", "method", "bits", "perplexity", "growth", "growth_low", "growth_high"]
    frame = data_frame(rows, names)
    return frame.dropna(subset=["bits", "perplexity", "growth"]).reset_index(drop=True)


def by_method(frame):
    """Bits per weight against the growth of perplexity, a mark per method; a line joins what nothing beats in both.

    The axis is linear up to one percent above bf16 and logarithmic from there: else either end would be one blot.

    Args:
        frame: as of `method_frame`.
    """
    marks = _marks(frame)

    def draw(axes):
        front = _front(frame)
        axes.axhline(0, color=SOFT, linewidth=1.2, linestyle="--")
        axes.plot(front["bits"], front["growth"], color=SOFT, linewidth=1, zorder=1)
        for _, row in frame.iterrows():
            *mark, fill = marks[row["method"]]
            point(axes, mark, row["bits"], row["growth"], yerr=whiskers(row, "growth"), size=5, fill=fill)
        axes.set_yscale("symlog", linthresh=NEAR, linscale=0.6)
        axes.margins(x=0.12, y=0.08)
        axes.set(xlabel=NAMES["bits"], ylabel="Perplexity (lower is better)")
        _ticks(axes, frame)
        mark_legend(axes, marks, 3)
        name_points(axes, frame, front, "bits", "growth")

    height = HEIGHT + 1.5 + 0.2 * -(-len(marks) // 3)
    return drawn(draw, height, "" if len(frame) else "Nothing has been measured yet.")


def _front(frame):
    """The strategies that no other beats in both, from few bits to many; a tenth of a bit is no difference."""
    return pareto_front(frame.assign(step=frame["bits"].round(1)), "step", "perplexity")


def _marks(frame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and filling of every method, that with most strategies first; other families keep their own."""
    known = [(color, marker) for color, marker, _ in (*MARKS.values(), OTHER)]
    families = dict(zip(frame["method"], frame["family"]))
    taken = [family_mark(family) for family in ("baseline", *QUANTIZED[1:])]
    free = itertools.product(("full", "none", "left", "top"), [mark for mark in known if mark not in taken])
    marks = {}
    for method in sorted(families, key=lambda name: (-(frame["method"] == name).sum(), name)):
        if families[method] == OWN:
            fill, mark = next(free)
            marks[method] = (*mark, fill)
    others = [method for method, family in families.items() if family != OWN]
    return marks | {method: (*family_mark(families[method]), "full") for method in others}


def _ticks(axes, frame) -> None:
    """At every tick the perplexity, and below it how far above bf16 that is."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    base = (frame["perplexity"] / (1 + frame["growth"] / 100)).median()
    growth = [f"+{tick} %" if tick else "bf16" for tick in ticks]
    labels = [f"{base * (1 + tick / 100):#.3g}\n{words}" for tick, words in zip(ticks, growth)]
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set_yticks([], minor=True)


def method_alt(frame) -> str:
    """The finding of the figure in words."""
    if frame.empty:
        return "Nothing has been measured yet."
    front = _front(frame)
    shown = [
        f"{row['strategy']} ({row['bits']:.3g} bits per weight, perplexity {row['growth']:+.3g} %)"
        for _, row in front.iterrows()
    ]
    counts = ", ".join(f"{count} by {method}" for method, count in front["method"].value_counts().items())
    return (
        f"Of {len(frame)} strategies by {frame['method'].nunique()} methods, {len(front)} are beaten by no other in "
        f"bits and perplexity: {', '.join(shown)}. That is {counts}."
    )
