"""Data frames for the figures of the report's page, made from the book, and what each figure shows in words."""

from typing import Any, Sequence

from qlib.report.book import SPEED_MODEL, Book, Entry
from qlib.report.numbers import number
from qlib.report.record_frames import curve_frame, data_frame, formats_frame, levels_frame, spread, spread_columns
from qlib.report.relations import is_control, kinds, recipe_of
from qlib.report.trained import ablations

__all__ = [
    "pareto_frame", "delta_frame", "ratio_frame", "ablation_frame", "training_frame", "training_groups", "precision_frame",
    "level_frame", "speed_frame", "pareto_alt", "delta_alt", "ratio_alt", "curve_alt", "level_alt", "speed_alt",
]  # fmt: skip

PARETO = {
    "bits": "size.bits_per_weight_total",
    "disk": "size.disk_bytes",
    "perplexity": "quality.perplexity",
    "accuracy": "quality.accuracy",
}


def pareto_frame(book: Book, model: str | None = None, families: Sequence[str] = ()):
    """strategy, family, bits (per weight of the whole model), disk (MB), perplexity and accuracy with intervals.

    Controls, which compress nothing, are left out.

    Args:
        families: only these; default: all.
    """
    rows = []
    for entry in book.of(model):
        if is_control(entry) or (families and entry.family not in families):
            continue
        found = {key: entry.measure(name) for key, name in PARETO.items()}
        row = {"strategy": entry.name, "family": entry.family, "bits": number(found["bits"])}
        row["disk"] = None if number(found["disk"]) is None else number(found["disk"]) / 1e6
        rows.append(row | spread("perplexity", found["perplexity"]) | spread("accuracy", found["accuracy"]))
    frame = data_frame(rows, ["strategy", "family", "bits", "disk", *spread_columns("perplexity", "accuracy")])
    return frame.dropna(subset=["disk", "accuracy"]).reset_index(drop=True)


def delta_frame(book: Book, model: str | None = None):
    """strategy, family, delta with its paired interval, and what the 99 % gate allows, all in points."""
    rows = []
    for entry in book.of(model):
        baseline = book.baseline(entry)
        accuracy = number(baseline and baseline.measure("quality.accuracy"))
        row = {"strategy": entry.name, "family": entry.family, "gate": accuracy and -0.01 * accuracy}
        rows.append(row | spread("delta", entry.measure("quality.accuracy_delta")))
    frame = data_frame(rows, ["strategy", "family", *spread_columns("delta"), "gate"])
    return frame.dropna(subset=["delta"]).reset_index(drop=True)


def ratio_frame(book: Book, family: str | None = None, model: str | None = None):
    """strategy, family, ratio: perplexity over the baseline's with its paired interval, the best first."""
    rows = []
    for entry in book.of(model, family):
        row = {"strategy": entry.name, "family": entry.family}
        rows.append(row | spread("ratio", entry.measure("quality.perplexity_ratio")))
    frame = data_frame(rows, ["strategy", "family", *spread_columns("ratio")]).dropna(subset=["ratio"])
    return frame.sort_values("ratio", kind="stable").reset_index(drop=True)


def ablation_frame(book: Book, model: str | None = None):
    """strategy, family, ratio: perplexity without some passes over that of the whole recipe, paired."""
    rows = []
    for part in (part for group in ablations(book, model) for part in group if part.missing):
        row = {"strategy": part.entry.name, "family": part.entry.family}
        rows.append(row | spread("ratio", part.ratio))
    frame = data_frame(rows, ["strategy", "family", *spread_columns("ratio")])
    return frame.dropna(subset=["ratio"]).reset_index(drop=True)


def training_frame(book: Book, family: str | None = None, model: str | None = None):
    """tokens, loss, series: every training pass; the loss on the development set where it was measured."""
    import pandas

    frames = [curve_frame([], "")]
    for entry in book.of(model, family):
        passes = (entry.record.get("details") or {}).get("training") or []
        for number_, one in enumerate(passes, start=1):
            name = entry.name if len(passes) == 1 else f"{entry.name} ({number_} of {len(passes)})"
            frames.append(curve_frame(one.get("development") or one.get("curve") or [], name))
    return pandas.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)


def training_groups(book: Book, family: str | None = None, model: str | None = None) -> dict[str, Any]:
    """What was trained -> its part of `training_frame`: controls, pruned models, those of so many bits."""
    import pandas

    frame, groups = training_frame(book, family, model), {}
    for entry in book.of(model, family):
        own = frame[frame["series"].str.partition(" (")[0] == entry.name]
        if len(own):
            groups.setdefault(_trained_kind(entry), []).append(own)
    return {name: pandas.concat(parts, ignore_index=True) for name, parts in groups.items()}


def _trained_kind(entry: Entry) -> str:
    if is_control(entry):
        return "controls"
    bits = [step["bits"] for step in recipe_of(entry) if step.get("bits")]
    what = "pruned models" if "prune" in kinds(entry) else "models"
    return f"{what} of {bits[-1]} bits" if bits else what


def precision_frame(entry: Entry | None):
    """tokens, loss, series: of training in several precisions; runs of several seeds share a series."""
    import pandas

    curves = (((entry and entry.record) or {}).get("details") or {}).get("curves") or {}
    frames = [curve_frame(points, name) for name, seeds in curves.items() for points in seeds.values()]
    return pandas.concat(frames, ignore_index=True) if frames else curve_frame([])


def level_frame(book: Book, model: str | None = None):
    """strategy, family, level, accuracy with interval: from ``details.levels`` of the records."""
    import pandas

    frames = [levels_frame((e.record.get("details") or {}).get("levels") or [], e) for e in book.of(model)]
    frames = [frame for frame in frames if len(frame)]
    return pandas.concat(frames, ignore_index=True) if frames else levels_frame([], None)


def speed_frame(book: Book, model: str = SPEED_MODEL, device: str | None = None):
    """format, decode and prefill time with intervals (ms), and the decode step's roofline floor (ms)."""
    records = book.speed.get(model, {})
    entry = records.get(device or next(iter(records), ""))
    return formats_frame(entry.record["formats"] if entry else {})


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


def ratio_alt(frame, to: str = "the baseline") -> str:
    """The finding of a figure of perplexity ratios in words."""
    if frame.empty:
        return "Nothing has been compared yet."
    best, worst = frame.loc[frame["ratio"].idxmin()], frame.loc[frame["ratio"].idxmax()]
    low, high = (f"{row['strategy']} with {row['ratio']:.3g} times the perplexity of {to}" for row in (best, worst))
    return f"Lowest is {low}" + (f", highest {high}." if len(frame) > 1 else ".")


def curve_alt(frame) -> str:
    """The finding of loss curves in words: where each begins and ends."""
    if frame.empty:
        return "No loss was recorded."
    ends = []
    for name, rows in frame.groupby("series", sort=False):
        means = rows.groupby("tokens")["loss"].mean()
        ends.append(f"{name} goes from {means.iloc[0]:.4g} to {means.iloc[-1]:.4g} after {means.index[-1]:,.0f} tokens")
    return f"Loss in nats per token: {'; '.join(ends)}."


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
