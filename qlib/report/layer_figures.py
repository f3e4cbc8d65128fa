"""Figures of one strategy: errors, masks, sensitivities and widths of its layers."""

from qlib.report.axes import ROW, drawn, lines
from qlib.report.labels import plain_ticks
from qlib.report.theme import HEIGHT, WIDTH, family_mark, style

__all__ = ["layer_errors", "sensitivities", "chosen_bits", "kept_cells", "batch_lines"]


def layer_errors(frame):
    """Reconstruction error of every linear by block, a line per kind of linear; what else it is, the frame says."""

    def draw(axes):
        lines(axes, frame, ("block", "Block"), ("error", frame.attrs.get("measure", "Relative error")), "linear")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return drawn(draw, HEIGHT + 0.7, "" if len(frame) else "No layer errors were recorded.")


def sensitivities(frame):
    """What rounding one linear alone does to the model, by block, a line per kind of linear.

    Args:
        frame: as of `layer_frames.sensitivity_frame`, of one width.
    """

    def draw(axes):
        lines(axes, frame, ("block", "Block"), ("kl", "KL divergence (nats per token)"), "linear")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return drawn(draw, HEIGHT + 0.7, "" if len(frame) else "No sensitivity was measured.")


def batch_lines(frame):
    """Milliseconds of a layer's linears over the number of requests, a line per format, both axes logarithmic.

    Args:
        frame: as of `record_frames.batches_frame`.
    """

    def draw(axes):
        lines(axes, frame, ("batch", "Requests at once"), ("ms", "Milliseconds"), "format")
        axes.set(xscale="log", yscale="log")
        plain_ticks(axes, frame["batch"], frame["ms"])
        batches = sorted(set(frame["batch"]))
        axes.set_xticks(batches, [f"{batch:g}" for batch in batches])

    return drawn(draw, HEIGHT + 0.5, "" if len(frame) else "No batches were timed.")


def chosen_bits(frame):
    """Width of every linear: a cell per block and linear, darker and with a larger number for more bits.

    Args:
        frame: as of `layer_frames.allocation_frame`.
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

    return drawn(draw, 1.2 + ROW * frame["linear"].nunique(), "" if len(frame) else "Nothing was allocated.")


def kept_cells(frame, across: str = "Input", down: str = "Output"):
    """Which cells of small matrices stayed: filled where something stayed, a panel each, side by side.

    Args:
        frame: as of `layer_frames.kept_frame`.
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
            axes.set(xlim=(0, cells["column"].max() + 1), ylim=(cells["row"].max() + 1, 0))
            axes.set(xticks=[], yticks=[], xlabel=across)
            axes.set_aspect("equal")
            axes.set_title(panel, fontsize=10)
            axes.grid(visible=False)
        figure.axes[0].set_ylabel(down)
        return figure
