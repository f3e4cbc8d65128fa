"""Figures of the benchmarks."""

import numpy as np

from qlib.report.axes import colors, drawn
from qlib.report.labels import plain_ticks
from qlib.report.theme import HEIGHT, INK, SOFT

__all__ = ["growth", "sparse_times"]

TICKS = (0.5, 0.8, 0.95, 0.99)  # sparsities that are named, where they were measured


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


def sparse_times(frame):
    """Milliseconds of a product over sparsity, a panel for each number of rows and a line for each sparse kernel.

    Axes are logarithmic, that of sparsity in what is left. Dense kernels, which gain nothing from zeros, lie level.

    Args:
        frame: as of `bench.sparse_frame`.
    """

    def draw(axes):
        figure, batches = axes.figure, list(dict.fromkeys(frame["rows"]))
        axes.remove()
        sparse, level = frame.dropna(subset="sparsity"), frame[frame["sparsity"].isna()]
        looks = dict(zip(dict.fromkeys(sparse["kernel"]), zip(colors(), "ov^D")))
        levels = dict(zip(dict.fromkeys(level["kernel"]), ((INK, "-"), (SOFT, "--"))))
        panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for panel, batch in zip(panels, batches):
            for kernel, part in sparse[sparse["rows"] == batch].groupby("kernel", sort=False):
                color, marker = looks[kernel]
                panel.plot(1 - part["sparsity"], part["ms"], color=color, marker=marker, label=kernel, zorder=3)
            for _, row in level[level["rows"] == batch].iterrows():
                color, dashes = levels[row["kernel"]]
                panel.axhline(row["ms"], color=color, linestyle=dashes, linewidth=1.2, label=f"dense {row['kernel']}")
            panel.set(xscale="log", yscale="log", xlabel="Sparsity")
            panel.set_title(f"{batch} row{'s' if batch > 1 else ''}", fontsize=10)
            plain_ticks(panel, 1 - part["sparsity"], frame["ms"])
            shown = [sparsity for sparsity in TICKS if sparsity in set(part["sparsity"])]
            panel.set_xticks([1 - sparsity for sparsity in shown], [f"{sparsity:g}" for sparsity in shown])
            panel.invert_xaxis()
        panels[0].set_ylabel("Milliseconds")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return drawn(draw, HEIGHT + 0.6, "" if len(frame) else "Sparse products were not measured here.")
