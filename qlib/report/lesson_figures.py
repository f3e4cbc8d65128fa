"""Figures that only lessons use: one function each, data frame in, matplotlib figure out."""

import itertools

from qlib.report.axes import colors, drawn, lines
from qlib.report.theme import HEIGHT, INK, LINE, PAPER, POINTS, SOFT

__all__ = [
    "weight_histogram", "matrix_steps", "error_by_column", "error_by_kept", "number_line", "magnitudes", "weight_path",
    "channel_maxima", "errors_by_linear",
]  # fmt: skip


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
            row.vlines(shared.index, 0, shared, color=colors()[0], linewidth=1.6)
            row.plot(shared.index, shared, "o", color=colors()[0], markersize=4)
            row.set_ylabel(f"{bits} bits")
        rows[-1].set_xlabel("Weight")

    return drawn(draw, HEIGHT + 0.9, "" if len(frame) else "No weights were rounded.")


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

    return drawn(draw, HEIGHT, "" if len(frame) else "Nothing was rounded.")


def error_by_column(frame):
    """Error of a layer's outputs over the number of columns that are rounded, a line per method."""

    def draw(axes):
        lines(axes, frame, ("columns", "Columns that are fixed"), ("error", "Relative error of the outputs"), "method")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return drawn(draw, HEIGHT, "" if len(frame) else "Nothing was rounded.")


def error_by_kept(frame):
    """Relative error of an output against the share of a matrix that stayed, a line per way of pruning.

    Args:
        frame: share, error, series.
    """
    axis = ("share", "Share of the input channels that stayed")

    def draw(axes):
        lines(axes, frame, axis, ("error", "Relative error of the output"), "series")

    return drawn(draw, HEIGHT, "" if len(frame) else "Nothing was pruned.")


def errors_by_linear(frame):
    """Relative error of a model's linears by block, a panel for each kind of linear, a line per method.

    Args:
        frame: block, linear, method, error.
    """
    import seaborn

    def draw(axes):
        figure, (linears, methods) = axes.figure, (list(dict.fromkeys(frame[name])) for name in ("linear", "method"))
        axes.remove()
        panels = figure.subplots(-(-len(linears) // 4), 4, sharex=True, sharey=True, squeeze=False)
        look = {"hue": "method", "style": "method", "markers": True, "dashes": False, "errorbar": None, "legend": "full"}
        look |= {"palette": dict(zip(methods, itertools.cycle(colors()))), "hue_order": methods, "style_order": methods}
        for place, (panel, linear) in enumerate(zip(panels.ravel(), linears)):
            seaborn.lineplot(frame[frame["linear"] == linear], x="block", y="error", ax=panel, **look)
            handles, _ = panel.get_legend_handles_labels()
            panel.get_legend().remove()
            panel.set_title(linear, fontsize=10)
            lowest = place + 4 >= len(linears)
            panel.set(xlabel="Block" if lowest else "", ylabel="", ylim=(0, 1.05 * frame["error"].max()))
            panel.tick_params(labelbottom=lowest)
            panel.xaxis.get_major_locator().set_params(integer=True)
        for panel in panels.ravel()[len(linears) :]:
            panel.set_axis_off()
        figure.supylabel("Relative error of the outputs", fontsize=POINTS)
        figure.legend(handles, methods, loc="outside lower center", ncols=3, columnspacing=1, handletextpad=0.3)

    rows = -(-frame["linear"].nunique() // 4)
    return drawn(draw, 1 + 1.4 * rows, "" if len(frame) else "Nothing was pruned.")


def channel_maxima(frame):
    """Largest activation of every channel as a share of the largest of all: a row per treatment, a column per case.

    Args:
        frame: case, treatment, channel, share.
    """

    def draw(axes):
        figure = axes.figure
        cases, treatments = (list(dict.fromkeys(frame[name])) for name in ("case", "treatment"))
        axes.remove()
        panels = figure.subplots(len(treatments), len(cases), sharex=True, sharey=True, squeeze=False)
        for row, treatment in zip(panels, treatments):
            for panel, case in zip(row, cases):
                shown = frame[(frame["case"] == case) & (frame["treatment"] == treatment)]
                panel.vlines(shown["channel"], 0, shown["share"], color=colors()[0], linewidth=1.3)
            row[0].set_ylabel(treatment.capitalize())
        for panel, case in zip(panels[0], cases):
            panel.set_title(case.capitalize(), fontsize=10)
        for panel in panels[-1]:
            panel.set_xlabel("Channel")
        panels[0][0].set(ylim=(0, 1.05), yticks=(0, 0.5, 1), yticklabels=("0", "½", "1"))

    return drawn(draw, HEIGHT + 0.9, "" if len(frame) else "Nothing was listened to.")


def number_line(frame):
    """The numbers a format can hold within a range: a tick per number, a line per format.

    Args:
        frame: format, value.
    """

    def draw(axes):
        names = list(dict.fromkeys(frame["format"]))
        for place, (name, color) in enumerate(zip(names, itertools.cycle(colors()))):
            values = frame[frame["format"] == name]["value"]
            axes.vlines(values, place - 0.3, place + 0.3, color=color, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False)
        axes.set_xlabel("Number")

    return drawn(draw, 1.2 + 0.42 * frame["format"].nunique(), "" if len(frame) else "There are no numbers.")


def magnitudes(frame, floor: float, floor_name: str):
    """How large numbers are, on a logarithmic axis, a curve per series; what lies left of the floor is lost.

    Args:
        frame: series, magnitude (above 0).
        floor: the least number a format can hold. floor_name: what it is called.
    """
    import seaborn

    def draw(axes):
        look = {"element": "step", "fill": False, "bins": 60, "log_scale": True}
        look |= {"palette": colors()[: frame["series"].nunique()]}
        seaborn.histplot(frame, x="magnitude", hue="series", ax=axes, **look)
        axes.axvline(floor, color=INK, linewidth=1.2, linestyle="--")
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right", "fontsize": 9}
        axes.annotate(floor_name, (floor, 0.5), (-4, 0), **where)
        axes.set(xlabel="Magnitude", ylabel="Numbers")
        seaborn.move_legend(axes, "lower center", bbox_to_anchor=(0.5, 1), ncols=2, title="")

    return drawn(draw, HEIGHT, "" if len(frame) else "There are no numbers.")


def weight_path(frame, target: float):
    """Where a weight goes as it is trained: step, value, series; a dashed line is the value it should have."""
    import seaborn

    def draw(axes):
        look = {"palette": colors()[: frame["series"].nunique()], "errorbar": None, "drawstyle": "steps-post"}
        seaborn.lineplot(frame, x="step", y="value", hue="series", style="series", ax=axes, **look)
        axes.axhline(target, color=SOFT, linewidth=1.2, linestyle="--")
        axes.set_xlabel("Update")
        axes.set_ylabel("Value")
        axes.get_legend().set_title("")

    return drawn(draw, HEIGHT)
