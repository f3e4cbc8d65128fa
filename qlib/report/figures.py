"""Every figure of the report: one function each, data frame in, matplotlib figure out.

Sizes and letters are made for a phone; a family has one colour and one marker everywhere (see `theme`).
"""

import itertools
from typing import Callable

from qlib.report.labels import name_points, plain_ticks
from qlib.report.measures import family_label
from qlib.report.theme import HEIGHT, INK, LINE, PAPER, SOFT, WIDTH, family_mark, style

__all__ = [
    "pareto", "accuracy_deltas", "perplexity_ratios", "accuracy_by_level", "speed_bars", "layer_errors", "loss_curve",
    "kept_cells", "error_by_kept", "sensitivities", "chosen_bits", "loss_differences", "number_line", "magnitudes",
    "weight_histogram", "matrix_steps", "error_by_column", "weight_path",
]  # fmt: skip

NAMES = {
    "bits": "Bits per weight, whole model",
    "disk": "Size on disk (MB)",
    "perplexity": "Perplexity (lower is better)",
    "accuracy": "Accuracy (%, higher is better)",
    "delta": "Change of accuracy (points)",
    "ratio": "Perplexity ratio to {}",
}
FEW = 12  # points that can all be named
IN_AXES = 3  # lines that a legend inside the axes can name
ROW = 0.29  # inches of a line in a figure that lists strategies


def _drawn(draw: Callable, height: float = HEIGHT, empty: str = ""):
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


def _families(axes, families, columns: int = 2) -> None:
    """A legend of the families that occur, below the axes."""
    from matplotlib.lines import Line2D

    present = list(dict.fromkeys(families))
    keys = []
    for family in present:
        color, marker = family_mark(family)
        keys.append(Line2D([], [], color=color, marker=marker, linestyle="", label=family_label(family)))
    axes.figure.legend(handles=keys, loc="outside lower center", ncols=min(columns, len(keys)), handletextpad=0.3)


def _points(axes, row, x, y, xerr=None, yerr=None, size: float = 6, fill: str = "full") -> None:
    """One strategy's value in its family's colour and marker, with its interval."""
    color, marker = family_mark(row["family"])
    look = {"color": color, "marker": marker, "markersize": size, "capsize": 2.5, "linewidth": 1.2}
    look |= {"fillstyle": fill, "markerfacecoloralt": PAPER}
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, **look)


def _whiskers(row, name: str) -> list[list[float]] | None:
    """Distances from a value down to its low and up to its high end, as matplotlib wants them."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low != low or high != high or low is None or high is None:
        return None
    return [[max(row[name] - low, 0)], [max(high - row[name], 0)]]


def pareto(frame, x: str = "disk", y: str = "accuracy"):
    """Size against quality. A line joins the strategies that no other beats in both.

    Args:
        frame: as of `frames.pareto_frame`.
        x: ``disk`` or ``bits``.
        y: ``accuracy`` or ``perplexity``.
    """
    frame = frame.dropna(subset=[x, y])

    def draw(axes):
        front = pareto_front(frame, x, y)
        axes.plot(front[x], front[y], color=SOFT, linewidth=1, zorder=1)
        for _, row in frame.iterrows():
            _points(axes, row, row[x], row[y], yerr=_whiskers(row, y), size=7)
        axes.set_xscale("log")
        if y == "perplexity":
            axes.set_yscale("log")
        plain_ticks(axes, frame[x], frame[y] if y == "perplexity" else None)
        axes.set_xlabel(NAMES[x])
        axes.set_ylabel(NAMES[y])
        axes.margins(x=0.2, y=0.15)
        _families(axes, frame["family"])
        name_points(axes, frame, front, x, y, all=len(frame) <= FEW)

    height = HEIGHT + 0.6 + 0.06 * max(len(frame) - FEW, 0)
    return _drawn(draw, height, "" if len(frame) else "Nothing has been measured yet.")


def pareto_front(frame, x: str, y: str):
    """The rows that no other row beats in size and quality, from small to large."""
    ordered = frame.sort_values([x, y], ascending=[True, y == "perplexity"])
    best = ordered[y].cummin() if y == "perplexity" else ordered[y].cummax()
    return ordered[(ordered[y] == best) & ~best.duplicated()]


def accuracy_deltas(frame):
    """A forest plot: change of accuracy against the baseline with its paired interval, zero and gate as lines."""

    def gate(axes):
        gates = frame["gate"].dropna()
        if len(gates):
            axes.axvline(gates.iloc[0], color=SOFT, linewidth=1.2, linestyle="--")
            where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right"}
            axes.annotate("gate", (gates.iloc[0], 1), (-3, 3), color=SOFT, fontsize=9, **where)
        axes.set_xlabel(NAMES["delta"])

    return _forest(frame, "delta", 0, gate)


def perplexity_ratios(frame, to: str = "the baseline"):
    """A forest plot on a logarithmic axis: perplexity over that of `to`, with its paired interval.

    Args:
        frame: as of `frames.ratio_frame` or `frames.ablation_frame`.
    """

    def scale(axes):
        axes.set_xscale("log")
        plain_ticks(axes, [1, *frame["ratio"]])
        axes.set_xlabel(NAMES["ratio"].format(to))

    return _forest(frame, "ratio", 1, scale)


def _forest(frame, name: str, none: float, finish: Callable):
    """A line per strategy: its value and interval, and where no difference would be."""

    def draw(axes):
        for place, (_, row) in enumerate(frame.iterrows()):
            _points(axes, row, row[name], place, xerr=_whiskers(row, name))
        axes.axvline(none, color=INK, linewidth=1.2)
        finish(axes)
        axes.set_yticks(range(len(frame)), frame["strategy"])
        axes.set_ylim(len(frame) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        _families(axes, frame["family"])

    return _drawn(draw, 1.5 + ROW * len(frame), "" if len(frame) else "Nothing has been compared yet.")


def accuracy_by_level(frame):
    """Accuracy by difficulty level, a line per strategy; how full a mark is tells the level."""
    strategies, levels = (list(dict.fromkeys(frame[name])) for name in ("strategy", "level"))

    def draw(axes):
        from matplotlib.lines import Line2D

        fills = dict(zip(levels, itertools.cycle(("full", "left", "none"))))
        for _, row in frame.iterrows():
            place = strategies.index(row["strategy"]) + 0.18 * (levels.index(row["level"]) - (len(levels) - 1) / 2)
            _points(axes, row, row["accuracy"], place, xerr=_whiskers(row, "accuracy"), fill=fills[row["level"]])
        axes.set_yticks(range(len(strategies)), strategies)
        axes.set_ylim(len(strategies) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("Accuracy (%)")
        look = {"color": SOFT, "marker": "o", "linestyle": "", "markerfacecoloralt": PAPER}
        keys = [Line2D([], [], fillstyle=fills[level], label=level, **look) for level in levels]
        axes.figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), handletextpad=0.3)
        _families(axes, frame["family"])

    return _drawn(draw, 1.9 + ROW * len(strategies), "" if len(frame) else "No levels were recorded.")


def speed_bars(frame, part: str = "decode"):
    """Time per number format with interval; a mark shows the roofline floor of a decode step.

    Args:
        part: ``decode`` (one token) or ``prefill`` (the prompt).
    """
    frame = frame.dropna(subset=[part])

    def draw(axes):
        for place, (_, row) in enumerate(frame.iterrows()):
            color, _ = family_mark("baseline" if row["format"] == "bf16" else "weight_quantization")
            fill = SOFT if row["format"] == "bf16" else color
            axes.barh(place, row[part], height=0.62, color=fill, xerr=_whiskers(row, part), ecolor=INK, capsize=2.5)
            end = row[f"{part}_high"] if row[f"{part}_high"] == row[f"{part}_high"] else row[part]
            text = f"{row[part]:,.3g}" if row[part] < 1000 else f"{row[part]:,.0f}"
            axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=10)
            if part == "decode" and row["floor"] == row["floor"]:
                floor, ends = [row["floor"]] * 2, [place - 0.42, place + 0.42]
                axes.plot(floor, ends, color=PAPER, linewidth=4, solid_capstyle="butt")
                name = "_" if place else "roofline floor"
                mark = {"color": family_mark("pruning")[0], "linewidth": 2.2, "solid_capstyle": "butt"}
                axes.plot(floor, ends, label=name, **mark)
        axes.set_yticks(range(len(frame)), frame["format"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlabel("Milliseconds per token" if part == "decode" else "Milliseconds for the prompt")
        if part == "decode" and frame["floor"].notna().any():
            axes.figure.legend(loc="outside lower center")

    return _drawn(draw, 1.3 + 0.42 * len(frame), "" if len(frame) else "Nothing has been timed yet.")


def layer_errors(frame):
    """Reconstruction error of every linear by block, a line per kind of linear."""

    def draw(axes):
        _lines(axes, frame, ("block", "Block"), ("error", "Relative error"), "linear")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(draw, HEIGHT + 0.7, "" if len(frame) else "No layer errors were recorded.")


def loss_curve(frame):
    """Training loss over tokens, one line per series."""

    def draw(axes):
        _lines(axes, frame, ("tokens", "Tokens"), ("loss", "Loss (nats per token)"), "series", markers=False)
        axes.xaxis.set_major_formatter(_tokens)

    count = frame["series"].nunique()
    height = HEIGHT + (0.1 * count if count > IN_AXES else 0)
    return _drawn(draw, height, "" if len(frame) else "No loss was recorded.")


def _lines(axes, frame, x: tuple[str, str], y: tuple[str, str], by: str, markers: bool = True) -> None:
    """A line per value of the column `by`, named beside or, where there are many, below the axes.

    Args:
        x, y: column and label.
        markers: tell lines apart by marks instead of dashes.
    """
    import seaborn

    names = list(dict.fromkeys(frame[by]))
    look = {"markers": True, "dashes": False} if markers else {}
    look |= {"palette": dict(zip(names, itertools.cycle(_colors()))), "errorbar": None, "legend": "full"}
    seaborn.lineplot(frame, x=x[0], y=y[0], hue=by, style=by, ax=axes, **look)
    axes.set(xlabel=x[1], ylabel=y[1])
    axes.get_legend().set_title("")
    if len(names) == 1 or len(names) > IN_AXES:
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
        columns = {"ncols": 3 if max(map(len, labels)) < 12 else 2, "columnspacing": 1, "handletextpad": 0.3}
        if len(names) > 1:
            axes.figure.legend(handles, labels, loc="outside lower center", **columns)


def _colors() -> list[str]:
    """The palette where colours stand for something else than families."""
    families = ("weight_quantization", "pruning", "mixed_precision", "finetuning", "combined", "tool")
    return [family_mark(family)[0] for family in families]


def _tokens(value: float, _) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k" if value else "0"


def weight_histogram(frame):
    """Weights as bars and, for each number of bits, what is left of them: a stem per stored value, one row each.

    Args:
        frame: bits, weight, stored: a line for every weight at every number of bits.
    """

    def draw(axes):
        figure, widths = axes.figure, list(dict.fromkeys(frame["bits"]))
        axes.remove()
        rows = figure.subplots(len(widths), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for row, bits in zip(rows, widths):
            part = frame[frame["bits"] == bits]
            shared = part["stored"].value_counts()
            row.hist(part["weight"], bins=31, color=LINE, edgecolor=SOFT, linewidth=0.5)
            row.vlines(shared.index, 0, shared, color=_colors()[0], linewidth=1.6)
            row.plot(shared.index, shared, "o", color=_colors()[0], markersize=4)
            row.set_ylabel(f"{bits} bits")
        rows[-1].set_xlabel("Weight")

    return _drawn(draw, HEIGHT + 0.9, "" if len(frame) else "No weights were rounded.")


def matrix_steps(frame):
    """How far each weight of a small matrix has moved as its columns are fixed from left to right, one panel per step.

    Args:
        frame: fixed (number of final columns), row, column, change.
    """
    from matplotlib.colors import LinearSegmentedColormap

    def draw(axes):
        figure, steps = axes.figure, list(dict.fromkeys(frame["fixed"]))
        axes.remove()
        # Not quite the palette's colours: those follow the page, and cells must keep their order on a dark one.
        tones = LinearSegmentedColormap.from_list("moved", ["#0070b0", "#f0f0f0", "#d45d00"])
        panels, far = figure.subplots(-(-len(steps) // 4), 4, squeeze=False).ravel(), frame["change"].abs().max() or 1
        for panel, fixed in zip(panels, steps):
            matrix = frame[frame["fixed"] == fixed].pivot(index="row", columns="column", values="change")
            drawn = panel.pcolormesh(matrix, cmap=tones, vmin=-far, vmax=far, edgecolor=PAPER, linewidth=0.6)
            panel.axvline(fixed, color=INK, linewidth=2.2)
            panel.set_title(f"{fixed} fixed", fontsize=9)
        for panel in panels:
            panel.set_axis_off()
            panel.invert_yaxis()
        figure.colorbar(drawn, ax=panels.tolist(), location="bottom", aspect=40, label="Change of the weight")

    return _drawn(draw, HEIGHT, "" if len(frame) else "Nothing was rounded.")


def error_by_column(frame):
    """Error of a layer's outputs over the number of columns that are rounded, a line per method."""

    def draw(axes):
        _lines(axes, frame, ("columns", "Columns that are fixed"), ("error", "Relative error of the outputs"), "method")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(draw, HEIGHT, "" if len(frame) else "Nothing was rounded.")


def kept_cells(frame, across: str = "Input", down: str = "Output"):
    """Which cells of small matrices stayed: filled where something stayed, a panel each, side by side.

    Args:
        frame: as of `frames.kept_frame`.
        across: what a column is. down: what a row is.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    panels = list(dict.fromkeys(frame["panel"]))
    with matplotlib.rc_context(style()):
        cell = min(WIDTH / len(panels) / (frame["column"].max() + 1), 0.28)  # inches
        figure = Figure(figsize=(WIDTH, min(max(cell * (frame["row"].max() + 1), 1.2), 6) + 0.9))
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
            cells = frame[frame["panel"] == panel]
            stayed = cells[cells["kept"]]
            places = zip(stayed["column"], stayed["row"])
            squares = [Path([(c, r), (c + 0.9, r), (c + 0.9, r + 0.9), (c, r + 0.9), (c, r)]) for c, r in places]
            axes.add_patch(PathPatch(Path.make_compound_path(*squares), color=family_mark("pruning")[0], linewidth=0))
            axes.set(xlim=(0, cells["column"].max() + 1), ylim=(cells["row"].max() + 1, 0), xticks=[], yticks=[], xlabel=across)
            axes.set_aspect("equal")
            axes.set_title(panel, fontsize=10)
            axes.grid(visible=False)
        figure.axes[0].set_ylabel(down)
        return figure


def error_by_kept(frame):
    """Relative error of an output against the share of a matrix that stayed, a line per way of pruning.

    Args:
        frame: share, error, series.
    """
    axis = ("share", "Share of the input channels that stayed")

    def draw(axes):
        _lines(axes, frame, axis, ("error", "Relative error of the output"), "series")

    return _drawn(draw, HEIGHT, "" if len(frame) else "Nothing was pruned.")


def sensitivities(frame):
    """What rounding one linear alone does to the model, by block, a line per kind of linear.

    Args:
        frame: as of `frames.sensitivity_frame`, of one width.
    """

    def draw(axes):
        _lines(axes, frame, ("block", "Block"), ("kl", "KL divergence (nats per token)"), "linear")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(draw, HEIGHT + 0.7, "" if len(frame) else "No sensitivity was measured.")


def chosen_bits(frame):
    """Width of every linear: a cell per block and linear, darker and with a larger number for more bits.

    Args:
        frame: as of `frames.allocation_frame`.
    """

    def draw(axes):
        from matplotlib.patches import Rectangle

        names, widths = list(dict.fromkeys(frame["linear"])), sorted(set(frame["bits"]))
        color = family_mark("mixed_precision")[0]
        for _, row in frame.iterrows():
            x, y = row["block"], names.index(row["linear"])
            share = (widths.index(row["bits"]) + 1) / len(widths)
            cell = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=color, alpha=0.15 + 0.55 * share, linewidth=0)
            axes.add_patch(cell)
            if frame["block"].max() < 16:
                axes.annotate(str(row["bits"]), (x, y), ha="center", va="center", fontsize=10)
        axes.set(xlim=(-0.6, frame["block"].max() + 0.6), ylim=(len(names) - 0.4, -0.6), xlabel="Block")
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(draw, 1.2 + ROW * frame["linear"].nunique(), "" if len(frame) else "Nothing was allocated.")


def loss_differences(frame):
    """Loss minus that of fp32 on the same batches, a line per precision.

    Args:
        frame: as of `frames.difference_frame`.
    """

    def draw(axes):
        _lines(axes, frame, ("tokens", "Tokens"), ("difference", "Loss minus fp32 (nats)"), "series", markers=False)
        axes.axhline(0, color=INK, linewidth=1.2)
        axes.xaxis.set_major_formatter(_tokens)

    return _drawn(draw, HEIGHT, "" if len(frame) else "Nothing was compared with fp32.")


def number_line(frame):
    """The numbers a format can hold within a range: a tick per number, a line per format.

    Args:
        frame: format, value.
    """

    def draw(axes):
        names = list(dict.fromkeys(frame["format"]))
        for place, (name, color) in enumerate(zip(names, itertools.cycle(_colors()))):
            values = frame[frame["format"] == name]["value"]
            axes.vlines(values, place - 0.3, place + 0.3, color=color, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False)
        axes.set_xlabel("Number")

    return _drawn(draw, 1.2 + 0.42 * frame["format"].nunique(), "" if len(frame) else "There are no numbers.")


def magnitudes(frame, floor: float, floor_name: str):
    """How large numbers are, on a logarithmic axis, a curve per series; what lies left of the floor is lost.

    Args:
        frame: series, magnitude (above 0).
        floor: the least number a format can hold. floor_name: what it is called.
    """
    import seaborn

    def draw(axes):
        look = {"element": "step", "fill": False, "bins": 60, "log_scale": True, "palette": _colors()[: frame["series"].nunique()]}
        seaborn.histplot(frame, x="magnitude", hue="series", ax=axes, **look)
        axes.axvline(floor, color=INK, linewidth=1.2, linestyle="--")
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right", "fontsize": 9}
        axes.annotate(floor_name, (floor, 0.5), (-4, 0), **where)
        axes.set(xlabel="Magnitude", ylabel="Numbers")
        seaborn.move_legend(axes, "lower center", bbox_to_anchor=(0.5, 1), ncols=2, title="")

    return _drawn(draw, HEIGHT, "" if len(frame) else "There are no numbers.")


def weight_path(frame, target: float):
    """Where a weight goes as it is trained: step, value, series; a dashed line is the value it should have."""
    import seaborn

    def draw(axes):
        look = {"palette": _colors()[: frame["series"].nunique()], "errorbar": None, "drawstyle": "steps-post"}
        seaborn.lineplot(frame, x="step", y="value", hue="series", style="series", ax=axes, **look)
        axes.axhline(target, color=SOFT, linewidth=1.2, linestyle="--")
        axes.set_xlabel("Update")
        axes.set_ylabel("Value")
        axes.get_legend().set_title("")

    return _drawn(draw, HEIGHT)
