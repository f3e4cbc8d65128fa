"""Sparsity against loss of all pruning methods on one axis: the frame from the book, the figure, and it in words."""

import itertools
from dataclasses import replace
from typing import Any

from qlib.errors import UserError
from qlib.models.shapes import Shape, find_shape
from qlib.recipe import pass_names
from qlib.report.axes import drawn, mark_legend, point, whiskers
from qlib.report.book import Book, Entry
from qlib.report.figures import pareto_front
from qlib.report.labels import name_points, plain_ticks
from qlib.report.numbers import number
from qlib.report.record_frames import data_frame, spread, spread_columns
from qlib.report.relations import kinds, untrained_of, wholes
from qlib.report.theme import HEIGHT, INK, MARKS, PAPER, SOFT

__all__ = ["sparsity_frame", "sparsity_of", "by_sparsity", "sparsity_alt"]

FAMILIES = ("pruning", "finetuning", "combined")
#: What is done besides to a strategy, and how that fills its mark. Of several the last that it has.
FILLS = {"as it is": "full", "N:M pattern": "none", "rounded, too": "bottom", "trained after it": "left"}
APART = 0.7  # percentage points between the marks of two methods at one sparsity


def sparsity_frame(book: Book, model: str | None = None):
    """strategy, family, method, pattern, also, before, sparsity (percent of the linears' weights), ratio with interval.

    `method` is the pass that prunes, `also` a key of `FILLS`, `before` the same strategy without training, where there is
    one; ratio is the perplexity over the baseline's on the same documents. Recipes without some of their passes are left out.
    """
    rows = []
    for entry in (one for family in FAMILIES for one in _whole(book, book.of(model, family))):
        step = pruning_step(entry)
        if step is None:
            continue
        before = untrained_of(book, entry)
        row = {"strategy": entry.name, "family": entry.family, "method": step["pass"], "pattern": step.get("pattern") or ""}
        row |= {"also": _also(entry, step), "before": before.name if before else "", "sparsity": sparsity_of(entry)}
        rows.append(row | spread("ratio", entry.measure("quality.perplexity_ratio")))
    figures = ["sparsity", *spread_columns("ratio")]
    frame = data_frame(rows, ["strategy", "family", "method", "pattern", "also", "before", *figures])
    return frame.astype(dict.fromkeys(figures, float)).dropna(subset=["ratio"]).reset_index(drop=True)


def _whole(book: Book, entries: list[Entry]) -> list[Entry]:
    """Of combined recipes those that are no part of another one; all others."""
    return wholes(book, entries) if entries and entries[0].family == "combined" else entries


def pruning_step(entry: Entry) -> dict[str, Any] | None:
    """The last step of the recipe whose pass lies in qlib/prune; None if there is none."""
    prunes = {name for name, module in pass_names().items() if module.startswith("qlib.prune.")}
    steps = [step for step in entry.params.get("recipe") or [] if isinstance(step, dict)]
    return next((step for step in reversed(steps) if step.get("pass") in prunes), None)


def _also(entry: Entry, step: dict[str, Any]) -> str:
    plain, pattern, rounded, trained = FILLS
    if "train" in kinds(entry):
        return trained
    format = str(entry.record.get("shape_format") or "mix")
    return rounded if not format.startswith("bf16") else pattern if step.get("pattern") else plain


def sparsity_of(entry: Entry) -> float:
    """Percent of the weights of the blocks' linears that is gone: narrower or fewer blocks, and zeros of masks.

    Linears count by their size, where the model's shape is known; otherwise alike.
    """
    kept, shape = {"heads": 1.0, "ffn": 1.0, "layers": 1.0} | (entry.record.get("kept") or {}), _shape(entry.model)
    narrow = shape and _narrowed(shape, kept)
    left = narrow.linear_parameters / shape.linear_parameters if narrow else (kept["heads"] + kept["ffn"]) / 2
    layers = (entry.record.get("details") or {}).get("layers") or []
    layers = [one for one in layers if number({"value": one.get("kept")}) is not None]
    sizes = [_size(narrow, str(one.get("name"))) for one in layers]
    stayed = sum(size * one["kept"] for size, one in zip(sizes, layers)) / sum(sizes) if layers else 1.0
    return 100 * (1 - left * kept["layers"] * stayed)


def _shape(model: str) -> Shape | None:
    try:
        return find_shape(model)
    except UserError:  # somebody's own model
        return None


def _narrowed(shape: Shape, kept: dict[str, float]) -> Shape:
    """The shape with the shares of heads and FFN channels that stayed; keys and values go where each head has its own."""
    heads, ffn = round(kept["heads"] * shape.heads), round(kept["ffn"] * shape.ffn)
    return replace(shape, heads=heads, kv_heads=heads if shape.heads == shape.kv_heads else shape.kv_heads, ffn=ffn)


def _size(shape: Shape | None, path: str) -> int:
    rows, columns = (shape.linears if shape else {}).get(".".join(path.split(".")[-2:]), (1, 1))
    return rows * columns


def by_sparsity(frame):
    """Sparsity against the perplexity ratio, a mark per method; how it is filled tells what else was done.

    A line joins the best of a method, as it is, at each sparsity; a dotted one leads from a strategy to the trained one.
    Methods stand a little apart where they take equally much.

    Args:
        frame: as of `sparsity_frame`.
    """

    def draw(axes):
        marks, places = _marks(frame), _places(frame)
        axes.axhline(1, color=INK, linewidth=1.2, zorder=1)
        for method, best in _best(places):
            axes.plot(best["at"], best["ratio"], color=marks[method][0], linewidth=1.2, zorder=1)
        for _, row in places.iterrows():
            before = places[places["strategy"] == row["before"]]
            path = [*before["at"], row["at"]], [*before["ratio"], row["ratio"]]
            axes.plot(*path, color=SOFT, linestyle=":", linewidth=1.2, zorder=1)
            fill = FILLS[row["also"]]
            point(axes, marks[row["method"]], row["at"], row["ratio"], yerr=whiskers(row, "ratio"), fill=fill)
        axes.set_yscale("log")
        plain_ticks(axes, None, [1, *frame["ratio"]])
        axes.margins(x=0.14, y=0.08)
        axes.set(xlabel="Weights of the linears that are gone (%)", ylabel="Perplexity ratio to the baseline")
        grey = {also: (SOFT, "o", fill) for also, fill in FILLS.items() if also in set(frame["also"])}
        mark_legend(axes, {method: (*mark, "full") for method, mark in marks.items()} | grey, 3)
        named = _named(places)
        name_points(axes, places, named, "at", "ratio", line=named.iloc[:0])
        for name in axes.texts:  # before the lines, behind marks and intervals
            name.set(zorder=1.5, bbox={"facecolor": PAPER, "linewidth": 0, "pad": 0.3})

    return drawn(draw, HEIGHT + 2.3, "" if len(frame) else "Nothing has been measured yet.")


def _marks(frame) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method, in the order of their names."""
    free = [(color, marker) for family, (color, marker, _) in MARKS.items() if family != "baseline"]
    free.sort(key=lambda mark: mark[1] == "P")  # half of a cross is hard to see
    return dict(zip(sorted(set(frame["method"])), itertools.cycle(free)))


def _places(frame):
    """The frame with `at`: where a strategy's mark stands, a little beside its sparsity."""
    methods = list(_marks(frame))
    shift = [APART * (methods.index(method) - (len(methods) - 1) / 2) for method in frame["method"]]
    return frame.assign(at=frame["sparsity"] + shift)


def _best(places):
    """Of every method, the best strategies as they are, one for each percent of sparsity, from little to much."""
    plain = places[places["also"] == next(iter(FILLS))].sort_values("ratio")
    for method, own in plain.groupby("method"):
        yield method, own.groupby(own["sparsity"].round()).first()


def _named(places):
    """What is named: the front, patterns by what they are, and the variants that no line runs through."""
    import pandas

    front, lines = _front(places), {name for _, best in _best(places) for name in best["strategy"]}
    variants = places[(places["also"] == next(iter(FILLS))) & ~places["strategy"].isin({*lines, *front["strategy"]})]
    patterns = places[(places["also"] == "N:M pattern") & ~places["strategy"].isin(front["strategy"])]
    return pandas.concat([front, patterns.assign(strategy=patterns["pattern"]), variants], ignore_index=True)


def _front(frame):
    """The strategies that no other beats in both, from much to little sparsity; a percentage point is no difference."""
    return pareto_front(frame.assign(left=100 - frame["sparsity"].round(), perplexity=frame["ratio"]), "left", "perplexity")


def sparsity_alt(frame) -> str:
    """The finding of the figure in words."""
    if frame.empty:
        return "Nothing has been measured yet."
    shown = [
        f"{row['strategy']} ({row['sparsity']:.3g} % gone, {row['ratio']:.3g} times the perplexity)"
        for _, row in _front(frame).iterrows()
    ]
    return (
        f"Of {len(frame)} strategies by {frame['method'].nunique()} methods, {len(shown)} are beaten by no other in sparsity "
        f"and perplexity: {', '.join(shown)}."
    )
