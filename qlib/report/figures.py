"""Figures that compare strategies and trainings: one function each, data frame in, matplotlib figure out.

Sizes and letters are made for a phone; a family has one colour and one marker everywhere (see `theme`).
"""

import itertools
from typing import Callable

from qlib.report.axes import IN_AXES, ROW, drawn, family_legend, lines, point, tokens, whiskers
from qlib.report.labels import name_points, plain_ticks
from qlib.report.theme import HEIGHT, INK, PAPER, SOFT, family_mark

__all__ = [
    "pareto", "pareto_front", "accuracy_deltas", "perplexity_ratios", "accuracy_by_level", "speed_bars", "loss_curve",
    "loss_differences", "share_curves",
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
            point(axes, family_mark(row["family"]), row[x], row[y], yerr=whiskers(row, y), size=7)
        axes.set_xscale("log")
        if y == "perplexity":
            axes.set_yscale("log")
        plain_ticks(axes, frame[x], frame[y] if y == "perplexity" else None)
        axes.set_xlabel(NAMES[x])
        axes.set_ylabel(NAMES[y])
        axes.margins(x=0.2, y=0.15)
        family_legend(axes, frame["family"])
        name_points(axes, frame, front, x, y, all=len(frame) <= FEW)

    height = HEIGHT + 0.6 + 0.06 * max(len(frame) - FEW, 0)
    return drawn(draw, height, "" if len(frame) else "Nothing has been measured yet.")


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
            point(axes, family_mark(row["family"]), row[name], place, xerr=whiskers(row, name))
        axes.axvline(none, color=INK, linewidth=1.2)
        finish(axes)
        axes.set_yticks(range(len(frame)), frame["strategy"])
        axes.set_ylim(len(frame) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        family_legend(axes, frame["family"])

    return drawn(draw, 1.5 + ROW * len(frame), "" if len(frame) else "Nothing has been compared yet.")


def accuracy_by_level(frame):
    """Accuracy by difficulty level, a line per strategy; how full a mark is tells the level."""
    strategies, levels = (list(dict.fromkeys(frame[name])) for name in ("strategy", "level"))

    def draw(axes):
        from matplotlib.lines import Line2D

        fills = dict(zip(levels, itertools.cycle(("full", "left", "none"))))
        for _, row in frame.iterrows():
            place = strategies.index(row["strategy"]) + 0.18 * (levels.index(row["level"]) - (len(levels) - 1) / 2)
            look = {"xerr": whiskers(row, "accuracy"), "fill": fills[row["level"]]}
            point(axes, family_mark(row["family"]), row["accuracy"], place, **look)
        axes.set_yticks(range(len(strategies)), strategies)
        axes.set_ylim(len(strategies) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("Accuracy (%)")
        look = {"color": SOFT, "marker": "o", "linestyle": "", "markerfacecoloralt": PAPER}
        keys = [Line2D([], [], fillstyle=fills[level], label=level, **look) for level in levels]
        axes.figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), handletextpad=0.3)
        family_legend(axes, frame["family"])

    return drawn(draw, 1.9 + ROW * len(strategies), "" if len(frame) else "No levels were recorded.")


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
            axes.barh(place, row[part], height=0.62, color=fill, xerr=whiskers(row, part), ecolor=INK, capsize=2.5)
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

    return drawn(draw, 1.3 + 0.42 * len(frame), "" if len(frame) else "Nothing has been timed yet.")


def loss_curve(frame):
    """Training loss over tokens, one line per series."""

    def draw(axes):
        lines(axes, frame, ("tokens", "Tokens"), ("loss", "Loss (nats per token)"), "series", markers=False)
        axes.xaxis.set_major_formatter(tokens)
        axes.locator_params(axis="x", nbins=5)

    count = frame["series"].nunique()
    height = HEIGHT + (0.1 * count if count > IN_AXES else 0)
    return drawn(draw, height, "" if len(frame) else "No loss was recorded.")


def loss_differences(frame):
    """Loss minus that of fp32 on the same batches, a line per precision.

    Args:
        frame: as of `record_frames.difference_frame`.
    """

    def draw(axes):
        lines(axes, frame, ("tokens", "Tokens"), ("difference", "Loss minus fp32 (nats)"), "series", markers=False)
        axes.axhline(0, color=INK, linewidth=1.2)
        axes.xaxis.set_major_formatter(tokens)

    return drawn(draw, HEIGHT, "" if len(frame) else "Nothing was compared with fp32.")


def share_curves(frame, of: str):
    """A share in percent over tokens, a line per precision.

    Args:
        frame: as of `record_frames.shares_frame`. of: what the share is of.
    """

    def draw(axes):
        lines(axes, frame, ("tokens", "Tokens"), ("share", f"{of} (%)"), "series")
        axes.xaxis.set_major_formatter(tokens)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(bottom=0)

    return drawn(draw, HEIGHT + 0.4, "" if len(frame) else "Nothing was counted.")
