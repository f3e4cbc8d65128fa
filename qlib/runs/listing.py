"""What `qlib list` and `qlib show` print."""

from pathlib import Path
from typing import Any, Iterable

from qlib.errors import UserError, nearest
from qlib.params import Strategy, from_dict
from qlib.paths import slug
from qlib.progress import clock
from qlib.runs.lessons import LESSON, is_lesson
from qlib.runs.provenance import device_class
from qlib.runs.state import State, folder_of, read_json, state_of

__all__ = ["table", "list_rows", "overridden", "find_record", "describe_record", "describe_lesson", "figure"]

COLUMNS = ("strategy", "tier", "state", "accuracy", "perplexity", "bits/weight", "disk", "took")
RIGHT = COLUMNS[3:]
PUBLISHED = "published"


def list_rows(strategies: Iterable[Strategy], root: Path, runs: Path) -> list[tuple[list[str], State]]:
    """One row per strategy: its state and the last figures; those of the published record if it was not run here."""
    rows = []
    for strategy in strategies:
        try:
            state = state_of(strategy, root, runs)
        except UserError as error:
            state = State("cannot run", runs, [str(error)])
        record = state.record
        if record is None and state.state == "never run":
            record = _published(strategy, root)
            state.state = PUBLISHED if record else state.state
        tier = LESSON if is_lesson(strategy) else strategy.tier
        rows.append(([strategy.name, tier, state.state, *_figures(record or {})], state))
    return rows


def overridden(runs: Path, strategies: Iterable[Strategy]) -> list[Strategy]:
    """Variants of `strategies` that were run with `-p`: they are in no file, only in their folders."""
    found, known = [], {strategy.name for strategy in strategies}
    folders = {folder_of(strategy, runs).parent for strategy in strategies}
    for file in sorted(file for folder in folders for file in folder.glob("*+*/record.json")):
        record = read_json(file)
        if record and file.parent.name.rpartition("+")[0] in known:
            try:
                found.append(from_dict(record.get("params"), file.parent.name))
            except UserError:
                continue  # made by an older version of the schema
    return found


def _published(strategy: Strategy, root: Path) -> dict[str, Any] | None:
    record = read_json(root / "reports" / PUBLISHED / "records" / strategy.name / "record.json")
    return record if record and record.get("model") == slug(strategy.model) else None


def _figures(record: dict[str, Any]) -> list[str]:
    measured = record.get("measurements", {})
    names = ("quality.accuracy", "quality.perplexity", "size.bits_per_weight", "size.disk_bytes")
    bits = "size.bits_per_weight" if "size.bits_per_weight" in measured else "size.bits_per_weight_total"
    shown = [figure(measured.get(bits if name == "size.bits_per_weight" else name)) for name in names]
    return [*shown, clock(record["duration_seconds"]) if record.get("duration_seconds") else ""]


def figure(measurement: dict[str, Any] | None) -> str:
    """Value and unit, short: ``90.8 %``, ``17.42``, ``1.9 MB``."""
    if not measurement:
        return ""
    value, unit = measurement["value"], measurement["unit"]
    if unit == "bytes":
        step = next((s for s in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= s[0]), (1, "B"))
        return f"{value / step[0]:.4g} {step[1]}"
    if unit == "percent":
        return f"{value:.1f} %"
    return f"{value:.4g}" if unit in ("perplexity", "bits") else f"{value:.4g} {unit}"


def table(rows: list[list[str]], columns: tuple[str, ...] = COLUMNS, right: tuple[str, ...] = RIGHT) -> str:
    """Text in columns."""
    width = [max(map(len, column)) for column in zip(columns, *rows)]
    aligned = [[c.rjust(w) if name in right else c.ljust(w) for name, c, w in zip(columns, row, width)] for row in rows]
    head = [name.rjust(w) if name in right else name.ljust(w) for name, w in zip(columns, width)]
    return "\n".join("  ".join(line).rstrip() for line in [head, *aligned])


def find_record(name: str, root: Path, runs: Path, model: str | None) -> dict[str, Any]:
    """The last record of a strategy: of this machine, else the published one.

    Raises:
        UserError: there is none; it names the nearest that there is.
    """
    published = root / "reports" / PUBLISHED / "records"
    where = slug(model) if model else "*"
    files = [file for device in (device_class(), "*") for file in sorted(runs.glob(f"{where}/{device}/*/record.json"))]
    files += sorted(published.glob("*/record.json"))
    for file in files:
        record = read_json(file) if file.parent.name == name else None
        if record and (not model or record.get("model") == slug(model)):
            return record
    known = sorted({file.parent.name for file in files})
    there = ", ".join(known) or "none, see `qlib run`"
    raise UserError(f"{name}: has no record{nearest(name, known)}; there are: {there}")


def describe_lesson(lesson: Strategy, state: State) -> str:
    """What there is to say about a lesson, which measures nothing."""
    lines = [f"{lesson.name}: {lesson.title.en} ({LESSON}, notebooks/{lesson.notebook})", f"state: {state.state}"]
    lines += [f"    {why}" for why in state.why]
    if state.record:
        lines.append(f"took {clock(state.record['duration_seconds'])}; its page is linked from the report")
    return "\n".join(lines)


def describe_record(record: dict[str, Any]) -> str:
    """A record for reading: what it is, its measurements, its protocol."""
    lines = [f"{record['name']}: {record['title']['en']} ({record['family']}, {record['model']}, {record['device']})"]
    groups = [("", record["measurements"])] + [(f"{name}: ", one) for name, one in record.get("formats", {}).items()]
    rows = []
    for prefix, measurements in groups:
        for name, one in measurements.items():
            interval = "" if one["low"] is None else f"{one['low']:.4g} to {one['high']:.4g}"
            value = f"{one['value']:.6g} {one['unit']}"
            rows.append([prefix + name, value, interval, str(one["n"] or ""), one["conditions"]])
    lines += ["", table(rows, ("measurement", "value", "interval", "n", "conditions"), ("interval", "n"))]
    if record.get("protocol"):
        lines += ["", f"protocol: {record['protocol']}"]
    where = record.get("provenance", {})
    lines += ["", f"measured {where.get('finished')} on {where.get('cpu')}, commit {where.get('commit')}"]
    return "\n".join(lines)
