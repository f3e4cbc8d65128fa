"""Data frames of a record of a true shape: methods, sizes, the check of the extrapolation; and their findings in words."""

from typing import Any, Mapping

from qlib.report import numbers
from qlib.report.record_frames import data_frame, spread, spread_columns

__all__ = ["methods_frame", "methods_alt", "sizes_frame", "sizes_alt", "check_frame", "check_alt", "SENTENCES", "sentence"]

NONE = "One layer of true shape was not measured here."


def _details(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("details") or {}


def methods_frame(record: Mapping[str, Any]):
    """method, family, layer (seconds of one), hours (of all, extrapolated): of what was measured, the quickest first."""
    layers = _details(record).get("layers", 0)
    rows = [
        {"method": name, "family": one["family"], "layer": one["seconds"], "hours": layers * one["seconds"] / 3600}
        for name, one in (_details(record).get("methods") or {}).items()
        if "seconds" in one
    ]
    return data_frame(sorted(rows, key=lambda row: row["layer"]), ["method", "family", "layer", "hours"])


def methods_alt(frame) -> str:
    """Which method is quickest and which slowest, in words."""
    if frame.empty:
        return NONE
    ends = [f"{row['method']} takes {row['layer']:.3g} seconds for one layer" for _, row in frame.iloc[[0, -1]].iterrows()]
    hours = frame["hours"].iloc[-1]
    return f"{ends[0]}, {ends[1]}, the most, which extrapolated to all layers is {hours:.2g} hours; each method was run once."


def sizes_frame(record: Mapping[str, Any]):
    """model, format, parameters (billions), gigabytes on disk, decode and prefill (ms) with intervals."""
    rows = []
    for model, one in (_details(record).get("sizes") or {}).items():
        for format, found in one["formats"].items():
            row = {"model": model, "format": format, "parameters": one["parameters"] / 1e9}
            row["gigabytes"] = found["size.disk_bytes"]["value"] / 1e9
            for part in ("decode", "prefill"):
                row |= spread(part, found[f"latency.{part}_ms"])
            rows.append(row)
    columns = ["model", "format", "parameters", "gigabytes", *spread_columns("decode", "prefill")]
    return data_frame(rows, columns)


def sizes_alt(frame) -> str:
    """From where to where size and time go, by format, in words."""
    if frame.empty:
        return "Models of several sizes were not timed here."
    found = []
    for format, part in frame.groupby("format", sort=False):
        small, large = part.loc[part["parameters"].idxmin()], part.loc[part["parameters"].idxmax()]
        found.append(
            f"in {format} size goes from {small['gigabytes']:.3g} to {large['gigabytes']:.3g} gigabytes and a token from "
            f"{small['decode']:.3g} to {large['decode']:.3g} milliseconds"
        )
    first, last = frame["parameters"].min(), frame["parameters"].max()
    return f"From {first:.3g} to {last:.3g} billion parameters: {'; '.join(found)}."


def check_frame(record: Mapping[str, Any]):
    """what (of the check), family, ratio of the whole to the sum of its parts with interval."""
    check, rows = _details(record).get("check") or {}, []
    for kind, family in (("speed", "weight_quantization"), ("compression", "combined")):
        for name, one in (check.get(kind) or {}).items():
            baseline = kind == "speed" and name.startswith("bf16")
            row = {"strategy": name, "family": "baseline" if baseline else family}
            rows.append(row | spread("ratio", one["ratio"]))
    return data_frame(rows, ["strategy", "family", *spread_columns("ratio")])


def check_alt(frame) -> str:
    """How far whole and sum are apart, in words."""
    if frame.empty:
        return "The extrapolation was not checked here."
    parts = [f"{row['strategy']} {row['ratio']:.3g}" for _, row in frame.iterrows()]
    return f"Time of the whole over the sum of its parts: {', '.join(parts)}; 1 is a perfect extrapolation."


def _methods(record: Mapping[str, Any]) -> str:
    """How many methods were measured, the quickest, the slowest, and what was not measured."""
    frame, methods = methods_frame(record), _details(record).get("methods") or {}
    if frame.empty:
        return NONE
    layers = _details(record)["layers"]
    first, last = frame.iloc[0], frame.iloc[-1]
    missing = [name for name, one in methods.items() if "reason" in one]
    text = (
        f"{len(frame)} of {len(methods)} methods were run on one layer, once each: {first['method']} takes "
        f"{first['layer']:.3g} s, {last['method']} {last['layer']:.3g} s; extrapolated to {layers} layers that is "
        f"{first['hours']:.2g} to {last['hours']:.2g} hours"
    )
    return text + (f". Not measured: {', '.join(missing)}." if missing else ".")


def _line(record: Mapping[str, Any]) -> str:
    """By which power of the number of parameters a token's time grows."""
    slopes = (_details(record).get("slopes") or {}).get("decode")
    if not slopes:
        return "Models of several sizes were not timed here, so there is no line."
    told = [f"{numbers.write({**one, 'unit': ''})} in {name}" for name, one in slopes.items()]
    far, count = max(one["farthest"] for one in slopes.values()), len(_details(record)["sizes"])
    return (
        f"Over {count} sizes the time of a token grows with the power {', '.join(told)} of the number of parameters, "
        f"where 1 is a straight proportion; the size that fits worst lies a factor of {far:.2f} off its line."
    )


def _check(record: Mapping[str, Any]) -> str:
    """How far the extrapolation is off where everything could be run."""
    check, parts = _details(record).get("check") or {}, []
    if not check:
        return check_alt(check_frame(record))
    for name, one in check["speed"].items():
        parts.append(f"{name} {numbers.write(one['ratio'])}")
    several = [f"{name} {numbers.write(one['ratio'])}" for name, one in check["compression"].items()]
    return (
        f"Run whole, {check['model']} takes so many times layers x layer + head: {', '.join(parts)}. Compressing several "
        f"layers takes so many times as long as as many times one: {', '.join(several)}."
    )


#: What a placeholder may ask for, of such a record.
SENTENCES = {"methods": _methods, "line": _line, "check": _check}


def sentence(name: str, record: Mapping[str, Any] | None) -> str:
    """A sentence about a record; None: there is none."""
    return SENTENCES[name](record or {})
