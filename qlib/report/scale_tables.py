"""Tables of a record of a true shape: what each method costs, models of several sizes, the check of the extrapolation.

Where there is no record they have no rows, and say so.
"""

from typing import Any, Mapping

from qlib.evaluate.whole_model import PHASES
from qlib.report import numbers
from qlib.report.html import Cell, Column, Table
from qlib.report.show import table

__all__ = ["methods_table", "sizes_table", "check_table"]

ABSENT, ONE = "Not measured here. ", "One layer, measured once"
MISSING = Cell(numbers.ABSENT, kind="absent")


def methods_table(record: Mapping[str, Any]) -> Table:
    """Every method: one layer as measured, all layers as extrapolated."""
    details = record.get("details") or {}
    layers = details.get("layers", "all")
    whole = f"Extrapolated to {layers} layers"
    measured = ("Time", "Peak memory beyond it", "Its linears", "Bits per weight")
    told = ("Time", "On disk", "Prefill", "Decode, per token", "Share of the roofline")
    rows = [_row(one, record["formats"].get(name, {}), layers) for name, one in (details.get("methods") or {}).items()]
    columns = [
        Column("Method"), *(Column(title, group=ONE) for title in measured),
        *(Column(title, group=whole) for title in told), Column("Remark"),
    ]  # fmt: skip
    caption = (
        f"{'' if rows else ABSENT}One layer of {record.get('model', 'a large model')}, random weights, by every method, each "
        f"run once (n = 1, so no interval), and all {layers} layers with the head, extrapolated. Prefill and decode are those "
        "of the format that is left: intervals over rounds. Zeros of a mask are left out on disk, and nowhere else."
    )
    return table(columns, rows, caption, "true-shape")


def _row(one: Mapping[str, Any], found: Mapping[str, dict], layers: int) -> list[Any]:
    head = Cell(one["title"], (one["format"],) if "format" in one else ())
    if "seconds" in one:
        measured = [
            {"value": one["seconds"], "unit": "seconds"},
            {"value": one["peak_bytes"], "unit": "bytes"},
            {"value": one["stored_bytes"], "unit": "bytes"},
            {"value": one["bits_per_weight"], "unit": "bits"},
            {"value": layers * one["seconds"] / 3600, "unit": "h"},
        ]
    else:
        measured = [MISSING] * 5
    names = ("size.disk_bytes", "latency.prefill_ms", "latency.decode_ms", "latency.roofline_fraction")
    later = [found.get(name) or MISSING for name in names]
    later[0] = later[0] if "seconds" in one else MISSING
    remark = f"Not measured: {one['reason']}." if "reason" in one else _foretold(one)
    return [head, *measured, *later, Cell(remark, kind="how")]


def _foretold(one: Mapping[str, Any]) -> str:
    """What narrower layers had foretold, if they were asked."""
    return f"Narrower layers foretold {one['foretold_seconds']:.3g} s." if "foretold_seconds" in one else ""


def sizes_table(record: Mapping[str, Any]) -> Table:
    """Powers of the number of parameters by which times grow, where at least two sizes were timed."""
    details = record.get("details") or {}
    slopes, rows = details.get("slopes") or {part: {} for part in PHASES}, []
    for format in slopes["decode"]:
        powers = [{**slopes[part][format], "unit": ""} for part in slopes]
        rows.append([format, *powers, *(slopes[part][format]["farthest"] for part in slopes)])
    sizes = ", ".join(details.get("sizes") or {}) or "several sizes"
    caption = (
        f"{'' if rows else ABSENT}Power of the number of parameters by which the time of a token and of a prefill grows over "
        f"{sizes}. Small print: 95 % bootstrap intervals over rounds, which tell noise alone. Worst fit: the factor by which a "
        "size lies off the line."
    )
    columns = ["Format", *(f"Power, {part}" for part in slopes), *(f"Worst fit, {part}" for part in slopes)]
    return table(columns, rows, caption, "size-powers")


def check_table(record: Mapping[str, Any]) -> Table:
    """Whole against sum of parts, with the ratio's interval."""
    check = (record.get("details") or {}).get("check") or {}
    columns = ["Compared", "What was timed", "Whole", "Sum of its parts", "Whole over sum"]
    rows = []
    for kind in ("speed", "compression"):
        for name, one in (check.get(kind) or {}).items():
            whole, summed = (Cell(numbers.write(one[part])) for part in ("whole", "sum"))
            rows.append([name, Cell(one["whole"]["conditions"], kind="how"), whole, summed, one["ratio"]])
    caption = (
        f"{'' if rows else ABSENT}The extrapolation checked where everything can be run: {check.get('model', 'a small model')} "
        "whole against layers x one layer + head, timed in the same rounds, and several layers of "
        f"{check.get('compressed', 'the smallest')} compressed against as many times one. Small print and "
        "brackets: 95 % bootstrap intervals over rounds. 1 is a perfect extrapolation."
    )
    return table(columns, rows, caption, "extrapolation")
