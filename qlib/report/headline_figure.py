"""The answer to the article's claim as a figure: size and speed against accuracy, with what it claims."""

from qlib.report.axes import drawn, family_legend, point, whiskers
from qlib.report.figures import NAMES
from qlib.report.headline import COMBINED, LIMIT, LOWEST, claims, gained, largest, largest_file
from qlib.report.labels import name_points, plain_ticks
from qlib.report.theme import HEIGHT, INK, PAPER, SOFT, family_mark

__all__ = ["answer"]

AXES = {"size_ratio": "Times smaller on disk", "speed_ratio": "Times as fast per request"}
CLAIMED = "claimed"


def answer(frame):
    """Two panels, one above the other: size ratio and speed ratio against the change of accuracy.

    Named are the claims, the strategies that answer them, of those that become equally much smaller or faster by pruning
    the best, with and without recovery, and combined ones that go further. The others stand behind, smaller and softer.

    Args:
        frame: as of `headline.headline_frame`.
    """

    def draw(axes):
        figure, shown = axes.figure, frame[frame["delta"] >= LOWEST]
        axes.remove()
        panels = dict(zip(AXES, figure.subplots(len(AXES), 1)))
        parts = {ratio: _named(shown.dropna(subset=[ratio]), ratio) for ratio in AXES}
        for ratio, panel in panels.items():
            _panel(panel, parts[ratio], ratio)
        family_legend(panel, shown["family"])
        for ratio, panel in panels.items():
            front = parts[ratio][parts[ratio]["named"] > 0].sort_values("named", kind="stable")
            name_points(panel, _obstacles(parts[ratio]), front, ratio, "delta", line=front.iloc[:0])
            for name in panel.texts:  # before the lines, behind marks and intervals
                name.set(zorder=1.5, bbox={"facecolor": PAPER, "linewidth": 0, "pad": 0.5})

    return drawn(draw, 2 * HEIGHT + 0.8, "" if len(frame) else "Nothing has been measured yet.")


def _named(frame, ratio: str):
    """The points of a panel with the claims among them; `named` says in which order names find a place, 0: none."""
    import pandas

    best = [row for row in (*(largest(frame, one) for one in AXES), largest_file(frame)) if row is not None]
    pruned = gained(frame[frame["pruning"] != ""], ratio).sort_values("delta_low")
    pruned = frame.index.isin(pruned.groupby([pruned[ratio].round(2), "pruning"]).tail(1).index)
    beyond = (frame["family"] == COMBINED) & (frame[ratio] > max((row[ratio] for row in best), default=1))
    named = 1 * frame["strategy"].isin([row["strategy"] for row in best]) + 2 * pruned + 4 * beyond
    claimed = claims().assign(strategy=CLAIMED, named=3)
    points = pandas.concat([frame.assign(named=named), claimed], ignore_index=True)
    return points.sort_values("delta", ascending=False, kind="stable")


def _obstacles(points):
    """What a name must not cover: every point, and the intervals of those with a name as far as the panel shows them."""
    low = points["delta_low"].clip(lower=LOWEST).where(points["named"] > 0)
    return points.assign(delta_low=low, delta_high=points["delta_high"].where(points["named"] > 0))


def _panel(axes, points, ratio: str) -> None:
    """Strategies with their intervals, the claims as hollow marks, and the loss that is claimed for pruning."""
    axes.axhline(0, color=INK, linewidth=1.2, zorder=1)
    axes.axhline(LIMIT, color=SOFT, linewidth=1.2, linestyle="--", zorder=1)
    for _, row in points.sort_values("named").iterrows():
        mark, claimed = family_mark(row["family"]), row["strategy"] == CLAIMED
        bars = {"xerr": whiskers(row, ratio) if f"{ratio}_low" in points else None, "yerr": whiskers(row, "delta")}
        look = {"size": 8, "fill": "none"} if claimed else {"soft": not row["named"]}
        point(axes, mark, row[ratio], row["delta"], **bars, **look)
    axes.set_xscale("log")
    plain_ticks(axes, points[ratio])
    axes.set(xlabel=AXES[ratio], ylabel=NAMES["delta"])
    axes.margins(x=0.16)
    axes.set_ylim(LOWEST, max(points["delta_high"].fillna(0).max(), 0) + 0.3)
