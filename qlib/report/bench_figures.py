"""Figures of the benchmarks."""

import numpy as np

from qlib.report.axes import colors, drawn
from qlib.report.labels import plain_ticks
from qlib.report.theme import HEIGHT, SOFT

__all__ = ["growth"]


def growth(frame):
    """Seconds of GPTQ over size, a panel for each kind of size, axes logarithmic, with the power law that fits best.

    Args:
        frame: as of `bench.growth_frame`.
    """
    import seaborn

    def draw(axes):
        figure, kinds = axes.figure, list(dict.fromkeys(frame["of"]))
        axes.remove()
        for panel, kind, color in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, colors()):
            part = frame[frame["of"] == kind]
            slope, start = np.polyfit(np.log(part["size"]), np.log(part["seconds"]), 1)
            panel.plot(part["size"], np.exp(start) * part["size"] ** slope, color=SOFT, linewidth=1)
            seaborn.scatterplot(part, x="size", y="seconds", color=color, s=50, ax=panel, zorder=3)
            panel.set(xscale="log", yscale="log", xlabel=f"{kind[:1].upper()}{kind[1:]}", ylabel="Seconds")
            panel.annotate(f"power {slope:.2f}", (0.06, 0.93), xycoords="axes fraction", va="top", fontsize=10)
            plain_ticks(panel, part["size"], part["seconds"])
            panel.set_xticks(part["size"], [f"{size:g}" for size in part["size"]])

    return drawn(draw, HEIGHT, "" if len(frame) else "Cost growth was not measured here.")
