"""What pruning whole heads, channels and blocks makes faster: the share of parameters that stays against the speed-up."""

from qlib.report.axes import drawn, family_legend, point, whiskers
from qlib.report.book import Book
from qlib.report.headline import gained, headline_frame
from qlib.report.labels import name_points
from qlib.report.theme import HEIGHT, SOFT, family_mark

__all__ = ["kept_speed_frame", "by_kept", "kept_speed_alt"]


def kept_speed_frame(book: Book, model: str | None = None):
    """strategy, family, kept (percent of the parameters), speedup of a request with interval, at the true shape.

    What trained strategies took over unchanged from one that is there, too, is left out: their shape is the same.
    """
    frame = headline_frame(book, model)
    frame = gained(frame[frame["pruning"] != ""], "size_ratio").dropna(subset=["speed_ratio"])
    frame = frame.assign(kept=100 / frame["size_ratio"]).sort_values(["kept", "pruning"], kind="stable")
    frame = frame.rename(columns=lambda name: name.replace("speed_ratio", "speedup"))
    frame = frame.drop_duplicates(["kept", "speedup"])
    return frame[["strategy", "family", "kept", "speedup", "speedup_low", "speedup_high"]].reset_index(drop=True)


def by_kept(frame):
    """Share of the parameters that stays against the speed-up; the line is where time falls as parameters do.

    Args:
        frame: as of `kept_speed_frame`.
    """
    import numpy

    def draw(axes):
        shares = numpy.linspace(min(frame["kept"].min() - 5, 90), 100, 50)
        axes.plot(shares, 100 / shares, color=SOFT, linewidth=1.2, linestyle="--", zorder=1, label="1 / share")
        for _, row in frame.iterrows():
            point(axes, family_mark(row["family"]), row["kept"], row["speedup"], yerr=whiskers(row, "speedup"))
        axes.set(xlabel="Parameters that stay (%)", ylabel="Times as fast per request")
        axes.margins(x=0.12, y=0.12)
        axes.legend(loc="lower left")
        family_legend(axes, frame["family"])
        name_points(axes, frame, frame, "kept", "speedup", line=frame.iloc[:0])

    return drawn(draw, HEIGHT + 0.3, "" if len(frame) else "Nothing that became smaller has been timed yet.")


def kept_speed_alt(frame) -> str:
    """The finding of the figure in words: what each gains beside what its parameters alone would give."""
    if frame.empty:
        return "Nothing that became smaller has been timed yet."
    shown = [
        f"{row['strategy']} keeps {row['kept']:.3g} % and is {row['speedup']:.3g} times as fast, where parameters alone "
        f"would give {100 / row['kept']:.3g}"
        for _, row in frame.iterrows()
    ]
    return f"{'; '.join(shown)}."
