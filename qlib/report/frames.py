"""Data frames for the figures, made from the book, and what each figure shows in words for its alternative text."""

from typing import Any, Sequence

from qlib.report.book import SPEED_MODEL, Book, Entry
from qlib.report.numbers import number
from qlib.report.relations import is_control
from qlib.report.tables import floor
from qlib.report.trained import ablations

__all__ = [
    "pareto_frame", "delta_frame", "ratio_frame", "ablation_frame", "training_frame", "precision_frame", "level_frame",
    "levels_frame", "speed_frame", "formats_frame", "layer_frame", "curve_frame", "pareto_alt", "delta_alt",
    "ratio_alt", "curve_alt", "layer_alt", "level_alt", "speed_alt",
    "pruned_frame", "kept_frame", "stayed_frame", "kept_alt", "passes_frame",
    "sensitivity_frame", "allocation_frame", "curves_frame", "difference_frame", "sensitivity_alt", "allocation_alt",
    "difference_alt",
]  # fmt: skip

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


def ratio_frame(book: Book, family: str | None = None, model: str | None = None):
    """strategy, family, ratio: perplexity over the baseline's with its paired interval, the best first."""
    rows = []
    for entry in book.of(model, family):
        row = {"strategy": entry.name, "family": entry.family}
        rows.append(row | _spread("ratio", entry.measure("quality.perplexity_ratio")))
    frame = _frame(rows, ["strategy", "family", *_columns("ratio")]).dropna(subset=["ratio"])
    return frame.sort_values("ratio", kind="stable").reset_index(drop=True)


def ablation_frame(book: Book, model: str | None = None):
    """strategy, family, ratio: perplexity without some passes over that of the whole recipe, paired."""
    rows = []
    for part in (part for group in ablations(book, model) for part in group if part.missing):
        row = {"strategy": part.entry.name, "family": part.entry.family}
        rows.append(row | _spread("ratio", part.ratio))
    return _frame(rows, ["strategy", "family", *_columns("ratio")]).dropna(subset=["ratio"]).reset_index(drop=True)


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


def pruned_frame(details: dict, strategy: str = ""):
    """strategy, block, linear, error: of the weights that were masked, or of the outputs of a narrowed model."""
    if not details.get("width"):
        return layer_frame(details.get("layers") or [], strategy)
    parts = {"o_proj": "attention_error", "o_proj before": "attention_error_plain"}
    parts |= {"down_proj": "ffn_error", "down_proj before": "ffn_error_plain"}
    rows = [
        {"strategy": strategy, "block": one["block"], "linear": linear, "error": one[key]}
        for linear, key in parts.items()
        for one in details["width"]
    ]
    return _frame(rows, ["strategy", "block", "linear", "error"])


def kept_frame(panels: dict[str, Any]):
    """panel, row, column, kept: from matrices of true and false by title."""
    rows = [
        {"panel": panel, "row": row, "column": column, "kept": bool(kept)}
        for panel, matrix in panels.items()
        for row, line in enumerate(matrix)
        for column, kept in enumerate(line)
    ]
    return _frame(rows, ["panel", "row", "column", "kept"])


def stayed_frame(subject: Any, size: int = 32):
    """The same of a pruned subject: the heads of a narrowed one by block, or else corners of two of the masks."""
    width = subject.details.get("width")
    if width:
        count = round(len(width[0]["heads"]) / subject.details["kept"]["heads"])
        return kept_frame({"Attention heads": [[head in one["heads"] for head in range(count)] for one in width]})
    names = [layer["name"] for layer in subject.details["layers"]]
    picked = {names[0].rpartition(".")[2]: names[0], names[-1].rpartition(".")[2]: names[-1]}
    weights = {title: subject.model.get_submodule(name).weight for title, name in picked.items()}
    return kept_frame({title: (weight[:size, :size] != 0).tolist() for title, weight in weights.items()})


def kept_alt(frame) -> str:
    """The finding of a picture of masks in words."""
    if frame.empty:
        return "Nothing was pruned."
    by_row = frame.groupby(["panel", "row"], sort=False)["kept"].mean().groupby(level=0, sort=False)
    shown = [
        f"{panel}: {100 * rows.mean():.3g} % of the cells stayed, {100 * rows.min():.3g} to {100 * rows.max():.3g} % in a row"
        for panel, rows in by_row
    ]
    return "; ".join(shown) + "."


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


def sensitivity_frame(sensitivity: list[dict], bits: int | None = None):
    """block, linear, bits, kl: from a record's ``details.sensitivity``; default: of the least width alone."""
    rows = [{**_place(one["name"]), "bits": one["bits"], "kl": one["kl"]} for one in sensitivity]
    frame = _frame(rows, ["block", "linear", "bits", "kl"])
    return frame[frame["bits"] == (frame["bits"].min() if bits is None else bits)].reset_index(drop=True)


def allocation_frame(allocation: dict[str, int]):
    """block, linear, bits: from a record's ``details.allocation``."""
    rows = [{**_place(name), "bits": bits} for name, bits in allocation.items()]
    return _frame(rows, ["block", "linear", "bits"])


def _place(name: str) -> dict[str, Any]:
    """Block and kind of a linear, from its path."""
    parts = name.split(".")
    return {"block": next((int(part) for part in parts if part.isdigit()), None), "linear": parts[-1]}


def curves_frame(curves: dict[str, dict[str, list]]):
    """tokens, loss, series: from ``details.curves`` of a comparison of precisions; seeds share a series."""
    rows = [
        {"tokens": tokens, "loss": loss, "series": name}
        for name, seeds in curves.items()
        for points in seeds.values()
        for tokens, loss in points
    ]
    return _frame(rows, ["tokens", "loss", "series"])


def difference_frame(curves: dict[str, dict[str, list]], reference: str = "fp32"):
    """tokens, difference, series, seed: loss minus that of the reference, by seed."""
    rows = []
    for name, seeds in curves.items():
        for seed, points in seeds.items():
            base = dict(map(tuple, curves[reference][seed]))
            same = [(tokens, loss - base[tokens]) for tokens, loss in points if tokens in base and name != reference]
            rows += [{"tokens": tokens, "difference": gap, "series": name, "seed": seed} for tokens, gap in same]
    return _frame(rows, ["tokens", "difference", "series", "seed"])


def sensitivity_alt(frame) -> str:
    """The finding of the sensitivities in words."""
    if frame.empty:
        return "No sensitivity was measured."
    worst, best = frame.loc[frame["kl"].idxmax()], frame.loc[frame["kl"].idxmin()]
    means = frame.groupby("linear", sort=False)["kl"].mean()
    return (
        f"At {worst['bits']} bits rounding {worst['linear']} of block {worst['block']} alone moves the model most, by "
        f"{worst['kl']:.2g} nats per token, {best['linear']} of block {best['block']} least, by {best['kl']:.2g}; on "
        f"average {means.idxmax()} matters most."
    )


def allocation_alt(frame) -> str:
    """The finding of an allocation of bits in words."""
    if frame.empty:
        return "Nothing was allocated."
    counts = frame["bits"].value_counts().sort_index()
    most = frame[frame["bits"] == frame["bits"].max()]["linear"].value_counts()
    shares = ", ".join(f"{count} linears get {bits} bits" for bits, count in counts.items())
    return f"{shares}; the greatest width goes most often to {most.idxmax()}, in {most.max()} blocks."


def difference_alt(frame) -> str:
    """The finding of the loss differences in words."""
    if frame.empty:
        return "Nothing was compared with fp32."
    spans = frame.groupby("series", sort=False)["difference"].agg(["min", "max"])
    ranges = (f"{name} lies between {row['min']:.2g} and {row['max']:.2g} nats" for name, row in spans.iterrows())
    return f"Loss minus that of fp32: {'; '.join(ranges)}."
