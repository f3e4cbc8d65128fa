"""Ticks and names in a figure: ordinary numbers on logarithmic axes, names that cover neither points nor names."""

from qlib.report.theme import INK, SOFT

__all__ = ["plain_ticks", "name_points"]

LIFTS = (0.2, 1, -1, 1.9, -1.9, 2.8, -2.8, -3.7, 3.7, 4.6, -4.6, 5.5, -5.5, 6.4, -6.4, 7.3, -7.3)  # lines of text
NARROW = 1.25  # the ratio of two ends of an axis below which even steps are as good as those of a logarithm
PLACES = [(side, lift) for lift in LIFTS for side in (1, -1)]


def plain_ticks(axes, xs, ys=None) -> None:
    """Few ticks with ordinary numbers on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        if values is None:
            continue
        range_ = max(values) / min(values)
        steps = (1,) if range_ > 1000 else (1, 2, 5) if range_ > 20 else (1, 1.5, 2, 3, 5, 7)
        steps = (1, 1.1, 1.2, 1.3, 1.5, 2, 8, 9) if range_ < 2 else steps
        narrow = MaxNLocator(4, steps=(1, 2, 5, 10)) if range_ < NARROW else None  # as good as linear
        axis.set_major_locator(narrow or LogLocator(subs=steps))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def name_points(axes, frame, front, x: str, y: str, all: bool = False, line=None) -> None:
    """Names beside the points of the front, each where it covers no point and no other name.

    Args:
        all: name the other points too, more softly, where there is room.
        line: corners of the line that names must not cover either; default: the front, which a line joins.
    """
    axes.figure.draw_without_rendering()  # so that places are known
    taken = _points(axes, frame, x, y) + _line(axes, front if line is None else line, x, y)
    rest = frame[~frame["strategy"].isin(front["strategy"])] if all else frame.iloc[:0]
    for rows, color in ((front, INK), (rest, SOFT)):
        for _, row in rows.iterrows():
            place = _place(axes, row[x], row[y], str(row["strategy"]), taken)
            if place:  # else too crowded: the data table names it
                taken.append(place[:4])
                _name(axes, row[x], row[y], str(row["strategy"]), place[4:], color)


def _points(axes, frame, x: str, y: str) -> list[tuple]:
    """Boxes around the points and their whiskers, in pixels."""
    boxes = []
    for _, row in frame.iterrows():
        ends = [row[f"{y}_{end}"] if row[f"{y}_{end}"] == row[f"{y}_{end}"] else row[y] for end in ("low", "high")]
        (px, low), (_, high) = (axes.transData.transform((row[x], end)) for end in ends)
        boxes.append((px - 5, low - 5, px + 5, high + 5))
    return boxes


def _line(axes, front, x: str, y: str) -> list[tuple]:
    """Boxes along the line that joins the front."""
    corners, boxes = [axes.transData.transform((row[x], row[y])) for _, row in front.iterrows()], []
    for (ax, ay), (bx, by) in zip(corners, corners[1:]):
        steps = [(ax + (bx - ax) * i / 40, ay + (by - ay) * i / 40) for i in range(41)]
        boxes += [(px - 1, py - 1, px + 1, py + 1) for px, py in steps]
    return boxes


def _place(axes, at_x: float, at_y: float, name: str, taken: list[tuple]) -> tuple | None:
    """The first box (left, low, right, high, side, lift) beside a point that is free and inside the figure."""
    letter, line = axes.figure.dpi / 72 * 5.2, axes.figure.dpi / 72 * 11  # about, of 9-point text
    px, py = axes.transData.transform((at_x, at_y))
    width = letter * len(name)
    for side, lift in PLACES:
        left, low = px + 8 if side > 0 else px - 8 - width, py + (lift - 0.5) * line
        box = (left, low, left + width, low + line)
        inside = left > axes.bbox.x0 and box[2] < axes.figure.bbox.x1 and low > axes.bbox.y0 and box[3] < axes.bbox.y1
        if inside and not any(_overlap(box, other) for other in taken):
            return (*box, side, lift)
    return None


def _name(axes, x: float, y: float, name: str, place: tuple, color: str) -> None:
    side, lift = place
    shift = (8 * 72 / axes.figure.dpi * side, lift * 11)
    end = {"shrinkA": 0, "relpos": (0 if side > 0 else 1, 0.5)}  # of the text, the one that is nearer
    leader = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, **end} if abs(lift) >= 1 else None
    text = {"textcoords": "offset points", "fontsize": 9, "ha": "left" if side > 0 else "right", "va": "center"}
    axes.annotate(name, (x, y), shift, color=color, arrowprops=leader, **text)


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
