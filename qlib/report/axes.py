"""What the figures share: a figure with one pair of axes, values with intervals, lines, legends, colours."""

import itertools
from typing import Callable

from qlib.report.measures import family_label
from qlib.report.theme import HEIGHT, PAPER, WIDTH, family_mark, style

__all__ = ["drawn", "family_legend", "mark_legend", "point", "whiskers", "lines", "colors", "tokens", "IN_AXES", "ROW"]

IN_AXES = 3  # lines that a legend inside the axes can name
ROW = 0.29  # inches of a line in a figure that lists strategies


def drawn(draw: Callable, height: float = HEIGHT, empty: str = ""):
    """Make a figure, let `draw` fill its axes, and say so where there is nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots()
        if empty:
            axes.set_axis_off()
            axes.text(0.5, 0.5, empty, ha="center", va="center", transform=axes.transAxes)
        else:
            draw(axes)
        return figure


def family_legend(axes, families) -> None:
    """A legend of the families that occur, below the axes."""
    mark_legend(axes, {family_label(family): (*family_mark(family), "full") for family in families})


def mark_legend(axes, marks: dict[str, tuple[str, str, str]], columns: int = 2) -> None:
    """A legend below the axes: colour, marker and filling by name."""
    from matplotlib.lines import Line2D

    look = {"linestyle": "", "markerfacecoloralt": PAPER}
    keys = [
        Line2D([], [], color=color, marker=marker, fillstyle=fill, label=name, **look)
        for name, (color, marker, fill) in marks.items()
    ]
    axes.figure.legend(handles=keys, loc="outside lower center", ncols=min(columns, len(keys)), handletextpad=0.3)


def point(
    axes, mark: tuple[str, str], x, y, xerr=None, yerr=None, size: float = 6, fill: str = "full", soft: bool = False
) -> None:
    """A value in its colour and marker, with its interval; a soft one stands back behind others."""
    look = dict(zip(("color", "marker"), mark)) | {"markersize": size, "capsize": 2.5, "linewidth": 1.2}
    look |= {"alpha": 0.3, "markersize": 0.7 * size, "capsize": 0} if soft else {}
    look |= {"fillstyle": fill, "markerfacecoloralt": PAPER}
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, **look)


def whiskers(row, name: str) -> list[list[float]] | None:
    """Distances from a value down to its low and up to its high end, as matplotlib wants them."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low != low or high != high or low is None or high is None:
        return None
    return [[max(row[name] - low, 0)], [max(high - row[name], 0)]]


def lines(axes, frame, x: tuple[str, str], y: tuple[str, str], by: str, markers: bool = True) -> None:
    """A line per value of the column `by`, named beside or, where there are many, below the axes.

    Args:
        x, y: column and label.
        markers: tell lines apart by marks instead of dashes.
    """
    import seaborn

    names = list(dict.fromkeys(frame[by]))
    look = {"markers": True, "dashes": False} if markers else {}
    look |= {"palette": dict(zip(names, itertools.cycle(colors()))), "errorbar": None, "legend": "full"}
    seaborn.lineplot(frame, x=x[0], y=y[0], hue=by, style=by, ax=axes, **look)
    axes.set(xlabel=x[1], ylabel=y[1])
    axes.get_legend().set_title("")
    if len(names) == 1 or len(names) > IN_AXES:
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
        columns = {"ncols": 3 if max(map(len, labels)) < 12 else 2, "columnspacing": 1, "handletextpad": 0.3}
        if len(names) > 1:
            axes.figure.legend(handles, labels, loc="outside lower center", **columns)


def colors() -> list[str]:
    """The palette where colours stand for something else than families."""
    families = ("weight_quantization", "pruning", "mixed_precision", "finetuning", "combined", "tool")
    return [family_mark(family)[0] for family in families]


def tokens(value: float, _) -> str:
    """A tick label for a number of tokens."""
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k" if value else "0"
