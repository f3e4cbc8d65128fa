"""Data frames from lists that one record holds: accuracy by level, times by format, losses of training."""

from typing import Any

from qlib.report.numbers import number
from qlib.report.tables import floor

__all__ = [
    "data_frame", "spread", "spread_columns", "levels_frame", "formats_frame", "batches_frame", "batches_alt", "curve_frame", "passes_frame",
    "curves_frame", "difference_frame", "difference_alt", "shares_frame", "shares_alt",
]  # fmt: skip


def data_frame(rows: list[dict], columns: list[str]):
    """A pandas data frame that has its columns even where it has no rows."""
    import pandas

    return pandas.DataFrame(rows, columns=columns)


def spread(name: str, measurement: dict | None) -> dict[str, float | None]:
    """A measurement as ``NAME``, ``NAME_low`` and ``NAME_high``: what `spread_columns` names."""
    ends = {f"{name}_{end}": number(measurement, end) for end in ("low", "high")}
    return {name: number(measurement), **ends}


def spread_columns(*names: str) -> list[str]:
    """The columns of values with intervals."""
    return [column for name in names for column in (name, f"{name}_low", f"{name}_high")]


def levels_frame(levels: list[dict], strategy: Any):
    """strategy, family, level, accuracy with interval: from a list of ``{level, value, low, high}``.

    Args:
        strategy: anything with a name and a family.
    """
    rows = []
    for level in levels:
        row = {"strategy": strategy.name, "family": strategy.family, "level": str(level.get("level"))}
        rows.append(row | spread("accuracy", level))
    frame = data_frame(rows, ["strategy", "family", "level", *spread_columns("accuracy")])
    return frame.dropna(subset=["accuracy"]).reset_index(drop=True)


def formats_frame(formats: dict[str, dict[str, dict]]):
    """format, decode and prefill time with intervals and the roofline floor (ms), from a record's ``formats``."""
    rows = []
    for name, measures in formats.items():
        row: dict[str, Any] = {"format": name, "floor": number(floor(measures))}
        for key in ("decode", "prefill"):
            row |= spread(key, measures.get(f"latency.{key}_ms"))
        rows.append(row)
    return data_frame(rows, ["format", *spread_columns("decode", "prefill"), "floor"])


def batches_frame(batches: dict[str, dict[str, dict]]):
    """batch, format, ms with interval: from a speed record's ``batches``."""
    rows = [
        {"batch": int(batch), "format": name, **spread("ms", one)}
        for batch, formats in batches.items()
        for name, one in formats.items()
    ]
    return data_frame(rows, ["batch", "format", *spread_columns("ms")])


def batches_alt(frame) -> str:
    """Which format is fastest for how many requests at once, in words."""
    if frame.empty:
        return "No batches were timed."
    best = frame.loc[frame.groupby("batch")["ms"].idxmin()]
    found = ", ".join(f"{row['format']} for {row['batch']} ({row['ms']:.3g} milliseconds)" for _, row in best.iterrows())
    return f"Fastest by number of requests at once: {found}."


def curve_frame(points: list, series: str = "loss"):
    """tokens, loss, series: from a list of ``[tokens, loss]``."""
    rows = [{"tokens": p[0], "loss": p[1], "series": series} for p in points]
    return data_frame(rows, ["tokens", "loss", "series"]).dropna().reset_index(drop=True)


def passes_frame(training: list[dict]):
    """tokens, loss, series: training and development loss of one strategy's training passes, one after the other.

    Args:
        training: a record's ``details.training``. Tokens are counted over all passes.
    """
    import pandas

    frames, before = [curve_frame([])], 0
    for number_, one in enumerate(training, start=1):
        place = f" {number_} of {len(training)}" if len(training) > 1 else ""
        for key, name in (("curve", "training"), ("development", "development text")):
            points = [[before + tokens, loss] for tokens, loss in one[key]]
            frames.append(curve_frame(points, name + place))
        before += one["tokens"]
    return pandas.concat([f for f in frames if len(f)] or frames, ignore_index=True)


def curves_frame(curves: dict[str, dict[str, list]]):
    """tokens, loss, series: from ``details.curves`` of a comparison of precisions; seeds share a series."""
    rows = [
        {"tokens": tokens, "loss": loss, "series": name}
        for name, seeds in curves.items()
        for points in seeds.values()
        for tokens, loss in points
    ]
    return data_frame(rows, ["tokens", "loss", "series"])


def difference_frame(curves: dict[str, dict[str, list]], reference: str = "fp32"):
    """tokens, difference, series, seed: loss minus that of the reference, by seed."""
    rows = []
    for name, seeds in curves.items():
        for seed, points in seeds.items():
            base = dict(map(tuple, curves[reference][seed]))
            same = [(tokens, loss - base[tokens]) for tokens, loss in points if tokens in base and name != reference]
            rows += [{"tokens": tokens, "difference": gap, "series": name, "seed": seed} for tokens, gap in same]
    return data_frame(rows, ["tokens", "difference", "series", "seed"])


def difference_alt(frame) -> str:
    """The finding of the loss differences in words."""
    if frame.empty:
        return "Nothing was compared with fp32."
    spans = frame.groupby("series", sort=False)["difference"].agg(["min", "max"])
    ranges = (f"{name} lies between {row['min']:.2g} and {row['max']:.2g} nats" for name, row in spans.iterrows())
    return f"Loss minus that of fp32: {'; '.join(ranges)}."


def shares_frame(shares: dict[str, dict[str, list]]):
    """tokens, share (%), series: from ``details.zero_gradients`` or ``lost_updates`` of a comparison of precisions."""
    rows = [
        {"tokens": tokens, "share": 100 * share, "series": name}
        for name, seeds in shares.items()
        for points in seeds.values()
        for tokens, share in points
    ]
    return data_frame(rows, ["tokens", "share", "series"])


def shares_alt(frame, what: str) -> str:
    """The finding of a figure of shares in words; `what`: of what, e.g. gradients that are 0."""
    if frame.empty:
        return f"No share of {what} was counted."
    means = frame.groupby("series", sort=False)["share"].mean()
    return f"Share of {what}, mean over the training: " + ", ".join(f"{name} {mean:.2g} %" for name, mean in means.items()) + "."
