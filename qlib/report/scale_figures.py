"""Figures of a true shape: what each method takes, sizes and times over parameters, whole against sum of parts."""

from qlib.report.axes import ROW, colors, drawn, family_legend, point, whiskers
from qlib.report.labels import plain_ticks
from qlib.report.theme import HEIGHT, INK, family_mark

__all__ = ["method_times", "size_lines", "whole_ratios"]

MARKERS = "ovsD^P"


def method_times(frame):
    """Seconds of one layer by method, on a logarithmic axis, each with the hours that all layers would take.

    Args:
        frame: as of `scale_frames.methods_frame`.
    """

    def draw(axes):
        for place, (_, row) in enumerate(frame.iterrows()):
            point(axes, family_mark(row["family"]), row["layer"], place, size=8)
            words = f"{row['hours']:.2g} h" if row["hours"] >= 0.1 else f"{60 * row['hours']:.2g} min"
            axes.annotate(words, (row["layer"], place), (9, 0), textcoords="offset points", va="center", fontsize=10)
        axes.set(xscale="log", xlabel="Seconds of one layer")
        plain_ticks(axes, [*frame["layer"], 2 * frame["layer"].max()])
        axes.set_xlim(frame["layer"].min() / 1.6, frame["layer"].max() * 3)
        axes.set_yticks(range(len(frame)), frame["method"])
        axes.set_ylim(len(frame) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        family_legend(axes, frame["family"])

    return drawn(draw, 1.5 + ROW * len(frame), "" if len(frame) else "Methods were not measured here.")


def size_lines(frame):
    """Gigabytes and milliseconds of a token over billions of parameters, a line per format, all axes logarithmic.

    Args:
        frame: as of `scale_frames.sizes_frame`.
    """

    def draw(axes):
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(2, 1, sharex=True)
        for panel, (name, label) in zip(panels, (("gigabytes", "GB on disk"), ("decode", "Milliseconds per token"))):
            for (format, part), color, marker in zip(frame.groupby("format", sort=False), colors(), MARKERS):
                part = part.sort_values("parameters")
                look = {"color": color, "marker": marker, "label": format, "markersize": 5, "linewidth": 1.2, "capsize": 2.5}
                ends = [part[name] - part["decode_low"], part["decode_high"] - part[name]] if name == "decode" else None
                panel.errorbar(part["parameters"], part[name], yerr=ends, **look)
            panel.set(xscale="log", yscale="log", ylabel=label)
            plain_ticks(panel, frame["parameters"], frame[name])
        panels[1].set_xlabel("Billions of parameters")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    return drawn(draw, 2 * HEIGHT, "" if len(frame) else "Models of several sizes were not timed here.")


def whole_ratios(frame):
    """Time of the whole over the sum of its parts, with intervals; the line is where both agree.

    Args:
        frame: as of `scale_frames.check_frame`.
    """

    def draw(axes):
        for place, (_, row) in enumerate(frame.iterrows()):
            point(axes, family_mark(row["family"]), row["ratio"], place, xerr=whiskers(row, "ratio"))
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.set_yticks(range(len(frame)), frame["strategy"])
        axes.set_ylim(len(frame) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("Whole over sum of its parts")

    return drawn(draw, 1.1 + ROW * len(frame), "" if len(frame) else "The extrapolation was not checked here.")
