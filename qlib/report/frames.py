"""Data frames for the figures, made from the book, and what each figure shows in words for its alternative text."""

from typing import Any

from qlib.report.book import SPEED_MODEL, Book
from qlib.report.numbers import number
from qlib.report.tables import floor

__all__ = [
    "pareto_frame",
    "delta_frame",
    "level_frame",
    "levels_frame",
    "speed_frame",
    "formats_frame",
    "layer_frame",
    "curve_frame",
    "pareto_alt",
    "delta_alt",
    "layer_alt",
    "level_alt",
    "speed_alt",
]

PARETO = {
    "bits": "size.bits_per_weight_total",
    "disk": "size.disk_bytes",
    "perplexity": "quality.perplexity",
    "accuracy": "quality.accuracy",
}


def _frame(rows: list[dict], columns: list[str]):
    import pandas

    return pandas.DataFrame(rows, columns=columns)


def _spread(name: str, measurement: dict | None) -> dict[str, float | None]:
    ends = {f"{name}_{end}": number(measurement, end) for end in ("low", "high")}
    return {name: number(measurement), **ends}


def _columns(*names: str) -> list[str]:
    return [column for name in names for column in (name, f"{name}_low", f"{name}_high")]


def pareto_frame(book: Book, model: str | None = None):
    """strategy, family, bits (per weight of the whole model), disk (MB), perplexity and accuracy with intervals."""
    rows = []
    for entry in book.of(model):
        found = {key: entry.measure(name) for key, name in PARETO.items()}
        row = {"strategy": entry.name, "family": entry.family, "bits": number(found["bits"])}
        row["disk"] = None if number(found["disk"]) is None else number(found["disk"]) / 1e6
        rows.append(row | _spread("perplexity", found["perplexity"]) | _spread("accuracy", found["accuracy"]))
    frame = _frame(rows, ["strategy", "family", "bits", "disk", *_columns("perplexity", "accuracy")])
    return frame.dropna(subset=["disk", "accuracy"]).reset_index(drop=True)


def delta_frame(book: Book, model: str | None = None):
    """strategy, family, delta with its paired interval, and what the 99 % gate allows, all in points."""
    rows = []
    for entry in book.of(model):
        baseline = book.baseline(entry)
        accuracy = number(baseline and baseline.measure("quality.accuracy"))
        row = {"strategy": entry.name, "family": entry.family, "gate": accuracy and -0.01 * accuracy}
        rows.append(row | _spread("delta", entry.measure("quality.accuracy_delta")))
    frame = _frame(rows, ["strategy", "family", *_columns("delta"), "gate"])
    return frame.dropna(subset=["delta"]).reset_index(drop=True)


def level_frame(book: Book, model: str | None = None):
    """strategy, family, level, accuracy with interval: from ``details.levels`` of the records."""
    import pandas

    frames = [levels_frame((e.record.get("details") or {}).get("levels") or [], e) for e in book.of(model)]
    frames = [frame for frame in frames if len(frame)]
    return pandas.concat(frames, ignore_index=True) if frames else levels_frame([], None)


def levels_frame(levels: list[dict], strategy: Any):
    """The same of one strategy, anything with a name and a family, from its list of ``{level, value, low, high}``."""
    rows = []
    for level in levels:
        row = {"strategy": strategy.name, "family": strategy.family, "level": str(level.get("level"))}
        rows.append(row | _spread("accuracy", level))
    frame = _frame(rows, ["strategy", "family", "level", *_columns("accuracy")])
    return frame.dropna(subset=["accuracy"]).reset_index(drop=True)


def speed_frame(book: Book, model: str = SPEED_MODEL, device: str | None = None):
    """format, decode and prefill time with intervals (ms), and the decode step's roofline floor (ms)."""
    records = book.speed.get(model, {})
    entry = records.get(device or next(iter(records), ""))
    return formats_frame(entry.record["formats"] if entry else {})


def formats_frame(formats: dict[str, dict[str, dict]]):
    """The same from a speed record's ``formats``."""
    rows = []
    for name, measures in formats.items():
        row: dict[str, Any] = {"format": name, "floor": number(floor(measures))}
        for key in ("decode", "prefill"):
            row |= _spread(key, measures.get(f"latency.{key}_ms"))
        rows.append(row)
    return _frame(rows, ["format", *_columns("decode", "prefill"), "floor"])


def layer_frame(layers: list[dict], strategy: str = ""):
    """strategy, block, linear, error: from a record's ``details.layers``, a list of ``{name, error, ...}``."""
    rows = []
    for layer in layers:
        parts = str(layer.get("name", "")).split(".")
        block = next((int(part) for part in parts if part.isdigit()), None)
        error = number({"value": layer.get("error")})
        rows.append({"strategy": strategy, "block": block, "linear": parts[-1], "error": error})
    return _frame(rows, ["strategy", "block", "linear", "error"]).dropna(subset=["error"]).reset_index(drop=True)


def curve_frame(points: list, series: str = "loss"):
    """tokens, loss, series: from a list of ``[tokens, loss]``."""
    rows = [{"tokens": p[0], "loss": p[1], "series": series} for p in points]
    return _frame(rows, ["tokens", "loss", "series"]).dropna().reset_index(drop=True)


def pareto_alt(frame, x: str = "disk", y: str = "accuracy") -> str:
    """The finding of the Pareto figure in words."""
    from qlib.report.figures import pareto_front

    frame = frame.dropna(subset=[x, y])
    if frame.empty:
        return "Nothing has been measured yet."
    front = pareto_front(frame, x, y)
    small, best = front.iloc[0], front.iloc[-1]
    unit = "megabytes on disk" if x == "disk" else "bits per weight"
    return (
        f"{len(front)} of {len(frame)} strategies are beaten by no other in size and {y}: "
        f"{', '.join(front['strategy'])}. They reach from {small['strategy']} with {small[x]:.3g} {unit} and {y} "
        f"{small[y]:.3g} to {best['strategy']} with {best[x]:.3g} and {best[y]:.3g}."
    )


def delta_alt(frame) -> str:
    """The finding of the accuracy changes in words."""
    if frame.empty:
        return "Nothing has been compared yet."
    same = frame[(frame["delta_low"] <= 0) & (frame["delta_high"] >= 0)]["strategy"]
    worst = frame.loc[frame["delta"].idxmin()]
    none = f"{', '.join(same)} show no measurable change" if len(same) else "Every strategy changes it measurably"
    return (
        f"Accuracy change of {len(frame)} strategies: {none}; {worst['strategy']} changes most for the worse, "
        f"by {worst['delta']:.3g} points."
    )


def layer_alt(frame) -> str:
    """The finding of the layer errors in words."""
    if frame.empty:
        return "No layer errors were recorded."
    worst, best = frame.loc[frame["error"].idxmax()], frame.loc[frame["error"].idxmin()]
    means = frame.groupby("linear", sort=False)["error"].mean()
    return (
        f"The error is largest in {worst['linear']} of block {worst['block']} with {worst['error']:.3g} and smallest "
        f"in {best['linear']} of block {best['block']} with {best['error']:.3g}; on average {means.idxmax()} suffers most."
    )


def level_alt(frame) -> str:
    """The finding of the levels in words: where the spread between strategies is largest."""
    if frame.empty:
        return "No levels were recorded."
    if frame["strategy"].nunique() == 1:
        levels = ", ".join(f"{row['accuracy']:.3g} at {row['level']}" for _, row in frame.iterrows())
        return f"Accuracy of {frame['strategy'].iloc[0]} in percent by level: {levels}; chance is 25."
    spread = frame.groupby("level", sort=False)["accuracy"].agg(["min", "max"])
    widest = (spread["max"] - spread["min"]).idxmax()
    low, high = spread.loc[widest]
    return f"Strategies differ most at level {widest}, from {low:.3g} to {high:.3g} percent accuracy; chance is 25."


def speed_alt(frame, part: str = "decode") -> str:
    """The finding of a speed figure in words."""
    frame = frame.dropna(subset=[part])
    if frame.empty:
        return "Nothing has been timed yet."
    fast, slow = frame.loc[frame[part].idxmin()], frame.loc[frame[part].idxmax()]
    return (
        f"{part.capitalize()}: {fast['format']} is fastest with {fast[part]:,.5g} milliseconds, "
        f"{slow['format']} slowest with {slow[part]:,.5g}."
    )
