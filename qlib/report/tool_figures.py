"""Figures of the league of tools: size against loss, and time against loss."""

import itertools

from qlib.report.axes import colors, drawn, mark_legend, point, whiskers
from qlib.report.book import Book
from qlib.report.labels import plain_ticks
from qlib.report.league import spent, standings, told
from qlib.report.numbers import number
from qlib.report.record_frames import data_frame, spread, spread_columns
from qlib.report.theme import HEIGHT, INK

__all__ = ["league_frame", "loss_alt", "size_against_loss", "time_against_loss", "time_alt"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
OURS = "ours"
TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000)  # percent
NEAR = 1.0  # percent: the axis is linear below it, logarithmic above


def league_frame(book: Book, model: str | None = None):
    """strategy, tool, bits (of a code), size (bits per weight), seconds, ratio (perplexity over the baseline's)."""
    rows = []
    for bits, members in standings(book, model).items():
        for one in (s for s in members if s.place):
            row = {"strategy": one.entry.name, "tool": told(one.entry)["name"] if not one.ours else OURS, "bits": bits}
            row |= {"size": number(one.entry.measure("size.bits_per_weight")), "seconds": number(spent(one.entry))}
            rows.append(row | spread("ratio", one.entry.measure("quality.perplexity_ratio")))
    frame = data_frame(rows, ["strategy", "tool", "bits", "size", "seconds", *spread_columns("ratio")])
    return frame.dropna(subset=["ratio", "size"]).reset_index(drop=True)


def _marks(frame) -> dict[str, tuple[str, str]]:
    """Tool -> colour and marker; ours in ink."""
    tools = sorted(set(frame["tool"]) - {OURS})
    pairs = zip(itertools.cycle(colors()), itertools.chain(*([marker] * len(colors()) for marker in MARKERS)))
    return {OURS: (INK, "*")} | dict(zip(tools, pairs))


def size_against_loss(frame):
    """Bits per weight with scales and zeros against the perplexity ratio, a mark per tool; a line joins ours."""
    return _drawn(frame, "size", "Bits per weight, with scales and zeros", "Nothing has been measured yet.")


def time_against_loss(frame, bits: int = 4):
    """Time of the quantization step against the perplexity ratio at one width, a mark per tool."""
    frame = frame[(frame["bits"] == bits) & (frame["seconds"] > 0)]
    return _drawn(frame, "seconds", "Time of the quantization step (s)", "Nothing has been timed yet.")


def _drawn(frame, x: str, label: str, empty: str):
    def draw(axes):
        marks = _marks(frame)
        own = frame[frame["tool"] == OURS].sort_values(x)
        if len(own) > 1:
            axes.plot(own[x], 100 * (own["ratio"] - 1), color=INK, linewidth=1, zorder=1)
        for _, row in frame.iterrows():
            size = 9 if row["tool"] == OURS else 6
            bars = whiskers(row, "ratio")
            ends = bars and [[100 * one[0]] for one in bars]
            point(axes, marks[row["tool"]], row[x], 100 * (row["ratio"] - 1), yerr=ends, size=size)
        axes.set_xscale("log")
        plain_ticks(axes, frame[x])
        axes.set_yscale("symlog", linthresh=NEAR)
        axes.set_yticks(TICKS, list(map(str, TICKS)))
        axes.set_ylim(-0.3, 1.5 * max(100 * (frame["ratio"].max() - 1), NEAR))
        axes.set_xlabel(label)
        axes.set_ylabel("Perplexity above the baseline's (%)")
        axes.margins(x=0.1, y=0.1)
        shown = {tool: (*mark, "full") for tool, mark in marks.items() if tool in set(frame["tool"])}
        mark_legend(axes, shown)

    rows = -(-frame["tool"].nunique() // 2)
    return drawn(draw, HEIGHT + 0.6 + 0.2 * rows, "" if len(frame) else empty)


def loss_alt(frame) -> str:
    """The finding of the figure of sizes in words."""
    if frame.empty:
        return "No tool has been measured here."
    best = frame.sort_values("ratio").groupby("bits", sort=True).first()
    facts = [f"with {bits} bits {row['strategy']}, {row['ratio']:.3f} of the baseline's perplexity" for bits, row in best.iterrows()]
    return f"The least loss: {'; '.join(facts)}."


def time_alt(frame, bits: int = 4) -> str:
    """The finding of the figure of times in words."""
    frame = frame[(frame["bits"] == bits) & (frame["seconds"] > 0)]
    if frame.empty:
        return "No time was measured here."
    fast, good = frame.sort_values("seconds").iloc[0], frame.sort_values("ratio").iloc[0]
    facts = [f"{row['strategy']} takes {row['seconds']:.3g} s for {row['ratio']:.3f} of the baseline's perplexity" for row in (fast, good)]
    return f"With {bits} bits {'; '.join(dict.fromkeys(facts))}."
