"""The answer to the article's claim: how much smaller and faster, for no more accuracy than it says pruning costs."""

from typing import Any

from qlib.report import numbers
from qlib.report.article import CLAIMS, SMALLER, Claim
from qlib.report.book import SPEED_MODEL, Book, Entry
from qlib.report.numbers import number
from qlib.report.record_frames import data_frame, spread, spread_columns
from qlib.report.relations import is_control, kinds, wholes

__all__ = [
    "LIMIT", "LOWEST", "COMBINED", "headline_frame", "claims", "gained", "largest", "largest_file", "headline_words",
    "headline_caption",
]  # fmt: skip

#: The article's row without compression, and the one that it makes its point with.
NONE: Claim = CLAIMS[0]
PRUNED: Claim = next(claim for claim in CLAIMS if claim.family == "pruning" and claim.size)
LIMIT = PRUNED.accuracy - NONE.accuracy  # points, below 0
#: The figure ends here, in points; what loses more is counted below it.
LOWEST = -6.0

RATIOS = {"size_ratio": "smaller on disk", "speed_ratio": "as fast per request"}
SIZES = {"size_ratio": "size.disk_bytes", "memory_ratio": "size.resident_bytes"}
COMBINED = "combined"  # the family whose strategies are also run without some of their passes


def headline_frame(book: Book, model: str | None = None):
    """strategy, family, pruning, size_ratio, memory_ratio, speed_ratio and delta (points, paired; both with intervals).

    Ratios are those of bf16 to the strategy at the true shape: bytes on disk, in memory, time of a request. `pruning` is
    ``alone`` where a strategy only prunes, ``then recovery`` where it trains after that, else empty. Left out are baselines
    and controls, what has no figures at that shape, and combined recipes without some of their passes.
    """
    whole = {e.name for e in wholes(book, [e for e in book.of(model, COMBINED) if e.measurements])}
    rows = []
    for entry in book.of(model):
        part = entry.family == COMBINED and entry.name not in whole
        if part or entry.family == "baseline" or is_control(entry) or not book.baseline(entry):
            continue
        own, bf16 = (_shape(book, one) for one in (entry, book.baseline(entry)))
        row = {"strategy": entry.name, "family": entry.family, "pruning": _pruning(entry)}
        for ratio, name in SIZES.items():
            size, before = (number(measures.get(name)) for measures in (own, bf16))
            row[ratio] = before / size if size and before else None
        row |= spread("speed_ratio", own.get("latency.request_speedup"))
        rows.append(row | spread("delta", entry.measure("quality.accuracy_delta")))
    figures = [*SIZES, *spread_columns("speed_ratio", "delta")]
    frame = data_frame(rows, ["strategy", "family", "pruning", *figures]).astype(dict.fromkeys(figures, float))
    return frame.dropna(subset=["size_ratio", "delta"]).reset_index(drop=True)


def _shape(book: Book, entry: Entry) -> dict[str, dict]:
    """Figures at the true shape: on the entry's device, or on the first that was timed."""
    devices = book.speed.get(SPEED_MODEL, {})
    return book.shape(entry, device=entry.device if entry.device in devices else next(iter(devices), None))


def _pruning(entry: Entry) -> str:
    if entry.family == "pruning":
        return "alone"
    return "then recovery" if entry.family == "finetuning" and {"prune"} == kinds(entry) - {"train"} else ""


def claims():
    """family, size_ratio, speed_ratio, delta: what the article claims, over its row without compression."""
    rows = [
        {"family": one.family, "size_ratio": NONE.size / one.size, "speed_ratio": NONE.time / one.time}
        | {"delta": one.accuracy - NONE.accuracy}
        for one in CLAIMS[1:]
        if one.size
    ]
    return data_frame(rows, ["family", "size_ratio", "speed_ratio", "delta"])


def gained(frame, ratio: str):
    """What becomes smaller, on disk and in memory, or measurably faster: zeros in a dense matrix do neither."""
    if ratio == "speed_ratio":
        return frame[frame["speed_ratio_low"] > 1]
    return frame[(frame["size_ratio"] >= 1 / SMALLER) & ~(frame["memory_ratio"] < 1 / SMALLER)]


def largest(frame, ratio: str):
    """The row with the largest ratio whose whole interval loses less than the limit; of equal ones the best; or None."""
    return _largest(gained(frame, ratio), ratio)


def largest_file(frame):
    """The same of pruning that becomes smaller on disk alone, where zeros need not be stored, though in memory they are."""
    return _largest(_files(frame), "size_ratio")


def _files(frame):
    files = frame[(frame["pruning"] != "") & (frame["size_ratio"] >= 1 / SMALLER)]
    return files[~files.index.isin(gained(files, "size_ratio").index)]


def _largest(rows, ratio: str):
    rows = rows[rows["delta_low"] > LIMIT].sort_values([ratio, "delta_low"])
    return rows.iloc[-1] if len(rows) else None


def headline_words(frame) -> str:
    """The largest ratios within the article's loss, of all strategies and of pruning, beside what it claims for pruning."""
    loss = f"{-LIMIT:.1f} points"
    claim = f"{_times(NONE.size / PRUNED.size)} smaller, {_times(NONE.time / PRUNED.time)} as fast, {loss} of accuracy lost"
    said = f"The article claims of pruning: {claim}."
    if frame.empty:
        return f"{said} Here no strategy has been measured at the true shape yet."
    if best := _reached(frame):
        said += f" Among the strategies whose whole interval stays within that loss, the most is {best}."
    else:
        said += " Here no strategy that becomes smaller or faster stays within that with its whole interval; "
        said += f"{_closest(frame)}."
    pruning = frame[frame["pruning"] != ""]
    if best := _reached(pruning):
        said += f" Pruning, alone or with recovery after it, reaches {best}."
    elif _either(pruning).empty:
        said += " No pruning strategy becomes smaller or faster."
    else:
        said += " No pruning strategy that becomes smaller or faster stays within it, with or without recovery; "
        said += f"{_closest(pruning)}."
    if (row := largest_file(frame)) is not None:
        by = f"{row['strategy']} ({_points(row)})"
        said += f" The file alone, without the zeros, is {_times(row['size_ratio'])} smaller by {by}."
    return said


def _either(frame):
    """What becomes smaller or faster."""
    return frame[frame.index.isin(gained(frame, "size_ratio").index.union(gained(frame, "speed_ratio").index))]


def _reached(frame) -> str:
    """Both largest ratios in words; empty where there is neither."""
    best = {ratio: row for ratio in RATIOS if (row := largest(frame, ratio)) is not None}
    by = {ratio: f"{row['strategy']} ({_points(row)})" for ratio, row in best.items()}
    if len(best) == 2 and len(set(by.values())) == 1:
        return f"{_gains(best['size_ratio'])}, both by {by['size_ratio']}"
    return " and ".join(f"{_ratio(row, ratio)} by {by[ratio]}" for ratio, row in best.items())


def _closest(frame) -> str:
    """Which strategy that gains something has the interval that ends nearest to the limit."""
    rows = _either(frame).dropna(subset=["delta_low"])
    if rows.empty:
        return "none of it has an interval"
    row = rows.loc[rows["delta_low"].idxmax()]
    return f"closest comes {row['strategy']}, {_gains(row)} ({_points(row)})"


def _gains(row) -> str:
    return " and ".join(_ratio(row, ratio) for ratio in RATIOS if row[ratio] == row[ratio])


def _ratio(row, ratio: str) -> str:
    times = _times(row[ratio]) if ratio == "size_ratio" else numbers.write(_measured(row, ratio, "ratio"))
    return f"{times} {RATIOS[ratio]}"


def _points(row) -> str:
    change = _measured(row, "delta", "points")
    return ", ".join(filter(None, (numbers.write(change, "value"), numbers.interval(change))))


def _times(value: float) -> str:
    return numbers.ratio({"value": value}, {"value": 1.0})


def _measured(row, name: str, unit: str) -> dict[str, Any]:
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"], "unit": unit}


def headline_caption(frame) -> str:
    """What is drawn, what the bars mean, and how many lie below the figure."""
    below = int((frame["delta"] < LOWEST).sum())
    hidden = f" {below} that {'loses' if below == 1 else 'lose'} more than {-LOWEST:g} points lie below the figure."
    zeros = " Files leave out the zeros of masks, which memory holds: strategies that save nothing else count as no smaller."
    return (
        f"How many times smaller and faster than bf16 at the shape of {SPEED_MODEL}, against the change of accuracy. Bars: "
        "95 % intervals, those of accuracy paired. Hollow: what the article claims; dashed: what pruning loses by its claim. "
        "Named: what answers it, and the best that pruning makes as small or fast. Outside tools have no figures at that shape."
        f"{hidden if below else ''}{zeros if len(_files(frame)) else ''}"
    )
