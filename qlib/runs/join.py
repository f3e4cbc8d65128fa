"""Put the figures of the speed records beside a strategy's own: `shape.size.*`, `shape.latency.*`."""

from pathlib import Path
from typing import Any, Iterable

from qlib.runs.state import read_json

__all__ = ["speed_records", "shape_measurements", "joined", "PREFERRED"]

#: The shape that the report is about; others serve where it was not measured.
PREFERRED = "qwen-72b"


def speed_records(runs: Path, published: Path) -> list[dict[str, Any]]:
    """All records of the speed family: those of this machine first, within these the preferred shape first."""
    found = []
    for rank, files in enumerate((runs.glob("*/*/*/record.json"), published.glob("records/*/record.json"))):
        for file in sorted(files):
            record = read_json(file)
            if record and record.get("family") == "speed" and record.get("formats"):
                found.append(((record.get("model") != PREFERRED, rank), record))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def shape_measurements(record: dict[str, Any], speeds: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of the record's format at a true model shape, from the first speed record on its device that has it.

    Nothing if the record names no format, or if parts of its layers were removed: then no record fits.
    """
    name, whole = record.get("shape_format"), all(share == 1 for share in (record.get("kept") or {}).values())
    for speed in speeds:
        if name in speed["formats"] and whole and speed.get("device") == record.get("device"):
            figures = speed["formats"][name].items()
            return {f"shape.{key}": figure | {"conditions": _of(speed, figure)} for key, figure in figures}
    return {}


def _of(speed: dict[str, Any], figure: dict[str, Any]) -> str:
    return "; ".join(filter(None, [f"shape of {speed['model']}, random weights", figure.get("conditions")]))


def joined(record: dict[str, Any], speeds: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record with the measurements of its shape among its own."""
    own = record.get("measurements", {})
    return record | {"measurements": own | shape_measurements(record, speeds)}
