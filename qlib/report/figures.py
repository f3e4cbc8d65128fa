"""Every figure of the report: one function each, data frame in, matplotlib figure out.

Sizes and letters are made for a phone; a family has one colour and one marker everywhere (see `theme`).
"""

import itertools
from typing import Callable

from qlib.report.measures import family_label
from qlib.report.theme import HEIGHT, INK, PAPER, SOFT, WIDTH, family_mark, style

__all__ = ["pareto", "accuracy_deltas", "accuracy_by_level", "speed_bars", "layer_errors", "loss_curve"]

NAMES = {
    "bits": "Bits per weight, whole model",
    "disk": "Size on disk (MB)",
    "perplexity": "Perplexity (lower is better)",
    "accuracy": "Accuracy (%, higher is better)",
}
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


def _points(axes, row, x, y, xerr=None, yerr=None, size: float = 6) -> None:
    """One strategy's value in its family's colour and marker, with its interval."""
    color, marker = family_mark(row["family"])
    look = {"color": color, "marker": marker, "markersize": size, "capsize": 2.5, "linewidth": 1.2}
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
        _plain_ticks(axes, frame[x], frame[y] if y == "perplexity" else None)
        axes.set_xlabel(NAMES[x])
        axes.set_ylabel(NAMES[y])
        axes.margins(x=0.2, y=0.15)
        _name_points(axes, frame, front, x, y)
        _families(axes, frame["family"])

    return _drawn(draw, HEIGHT + 0.6, "" if len(frame) else "Nothing has been measured yet.")


def pareto_front(frame, x: str, y: str):
    """The rows that no other row beats in size and quality, from small to large."""
    ordered = frame.sort_values([x, y], ascending=[True, y == "perplexity"])
    best = ordered[y].cummin() if y == "perplexity" else ordered[y].cummax()
    return ordered[(ordered[y] == best) & ~best.duplicated()]


def _plain_ticks(axes, xs, ys=None) -> None:
    """Few ticks with ordinary numbers on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        if values is None:
            continue
        range_ = max(values) / min(values)
        steps = (1,) if range_ > 1000 else (1, 2, 5) if range_ > 20 else (1, 1.5, 2, 3, 5, 7)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_points(axes, frame, front, x: str, y: str) -> None:
    """Names beside the points of the front, each where it covers no point and no other name."""
    axes.figure.canvas.draw()
    letter, line = axes.figure.dpi / 72 * 5.2, axes.figure.dpi / 72 * 11  # about, of 9-point text
    taken = []
    for _, row in frame.iterrows():
        ends = [row[f"{y}_{end}"] if row[f"{y}_{end}"] == row[f"{y}_{end}"] else row[y] for end in ("low", "high")]
        (px, low), (_, high) = (axes.transData.transform((row[x], end)) for end in ends)
        taken.append((px - 5, low - 5, px + 5, high + 5))
    corners = [axes.transData.transform((row[x], row[y])) for _, row in front.iterrows()]
    for (ax, ay), (bx, by) in zip(corners, corners[1:]):
        steps = [(ax + (bx - ax) * i / 40, ay + (by - ay) * i / 40) for i in range(41)]
        taken += [(px - 1, py - 1, px + 1, py + 1) for px, py in steps]
    left, right = axes.bbox.x0, axes.figure.bbox.x1
    for _, row in front.iterrows():
        px, py = axes.transData.transform((row[x], row[y]))
        width = letter * len(str(row["strategy"]))
        places = [(side, lift) for lift in (0.2, 1, -1, 1.9, -1.9, 2.8, -2.8, -3.7, 3.7) for side in (1, -1)]
        boxes = [(px + 8 if s > 0 else px - 8 - width, py + (up - 0.5) * line, s, up) for s, up in places]
        boxes = [(bx, by, bx + width, by + line, s, up) for bx, by, s, up in boxes if bx > left and bx + width < right]
        best = next((box for box in boxes if not any(_overlap(box, other) for other in taken)), None)
        if best is None:  # too crowded: the data table names it
            continue
        taken.append(best[:4])
        shift = (8 * 72 / axes.figure.dpi * best[4], best[5] * 11)
        side = "left" if best[4] > 0 else "right"
        leader = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkA": 0} if abs(best[5]) > 1 else None
        text = {"textcoords": "offset points", "fontsize": 9, "ha": side, "va": "center", "arrowprops": leader}
        axes.annotate(str(row["strategy"]), (row[x], row[y]), shift, **text)


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def accuracy_deltas(frame):
    """A forest plot: change of accuracy against the baseline with its paired interval, zero and gate as lines."""

    def draw(axes):
        for place, (_, row) in enumerate(frame.iterrows()):
            _points(axes, row, row["delta"], place, xerr=_whiskers(row, "delta"))
        axes.axvline(0, color=INK, linewidth=1.2)
        gate = frame["gate"].dropna()
        if len(gate):
            axes.axvline(gate.iloc[0], color=SOFT, linewidth=1.2, linestyle="--")
            where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right"}
            axes.annotate("gate", (gate.iloc[0], 1), (-3, 3), color=SOFT, fontsize=9, **where)
        axes.set_yticks(range(len(frame)), frame["strategy"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("Change of accuracy (points)")
        _families(axes, frame["family"])

    return _drawn(draw, 1.5 + ROW * len(frame), "" if len(frame) else "Nothing has been compared yet.")


def accuracy_by_level(frame):
    """Accuracy by difficulty level, a line per strategy in its family's colour, named at its end."""

    def draw(axes):
        levels = list(dict.fromkeys(frame["level"]))
        strategies = list(dict.fromkeys(frame["strategy"]))
        for place, strategy in enumerate(strategies):
            rows = frame[frame["strategy"] == strategy]
            shift = (place - (len(strategies) - 1) / 2) * 0.5 / max(len(strategies), 1)
            for _, row in rows.iterrows():
                where = levels.index(row["level"]) + shift
                _points(axes, row, where, row["accuracy"], yerr=_whiskers(row, "accuracy"), size=5)
        axes.set_xticks(range(len(levels)), levels)
        axes.set_xlabel("Difficulty level")
        axes.set_ylabel("Accuracy (%)")
        _families(axes, frame["family"])

    return _drawn(draw, HEIGHT + 0.6, "" if len(frame) else "No levels were recorded.")


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
    import seaborn

    def draw(axes):
        palette = dict(zip(dict.fromkeys(frame["linear"]), itertools.cycle(_colors())))
        look = {"markers": True, "dashes": False, "palette": palette, "errorbar": None, "legend": "full"}
        seaborn.lineplot(frame, x="block", y="error", hue="linear", style="linear", ax=axes, **look)
        axes.set_yscale("log")
        axes.set_xlabel("Block")
        axes.set_ylabel("Relative error")
        axes.xaxis.get_major_locator().set_params(integer=True)
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=3, handletextpad=0.3, columnspacing=1)

    return _drawn(draw, HEIGHT + 0.7, "" if len(frame) else "No layer errors were recorded.")


def loss_curve(frame):
    """Training loss over tokens, one line per series."""
    import seaborn

    def draw(axes):
        palette = dict(zip(dict.fromkeys(frame["series"]), itertools.cycle(_colors())))
        look = {"palette": palette, "errorbar": None, "legend": "full"}
        seaborn.lineplot(frame, x="tokens", y="loss", hue="series", style="series", ax=axes, **look)
        axes.set_xlabel("Tokens")
        axes.set_ylabel("Loss (nats per token)")
        axes.xaxis.set_major_formatter(_tokens)
        axes.get_legend().set_title("")
        if frame["series"].nunique() == 1:
            axes.get_legend().remove()

    return _drawn(draw, HEIGHT, "" if len(frame) else "No loss was recorded.")


def _colors() -> list[str]:
    """The palette where colours stand for something else than families."""
    families = ("weight_quantization", "pruning", "mixed_precision", "finetuning", "combined", "tool")
    return [family_mark(family)[0] for family in families]


def _tokens(value: float, _) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k" if value else "0"
