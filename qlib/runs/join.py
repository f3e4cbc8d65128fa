"""Put the figures of the speed records beside a strategy's own: `shape.size.*`, `shape.latency.*`."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterable

from qlib.errors import UserError
from qlib.runs.state import read_json

__all__ = ["speed_records", "shape_measurements", "shape_figures", "joined", "PREFERRED"]

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
    """Figures of the record's format at a true model shape, under names that begin with ``shape.``.

    They come from the first speed record on its device that has timed the format; where none has, there are the sizes,
    which are arithmetic. Nothing if the record names no format.
    """
    here = [speed for speed in speeds if speed.get("device") == record.get("device")]
    found = [(speed, shape_figures(record, speed)) for speed in here]
    found.sort(key=lambda pair: "latency.decode_ms" not in pair[1])
    speed, figures = found[0] if found else ({}, {})
    return {f"shape.{key}": one | {"conditions": _of(speed, one)} for key, one in figures.items()}


def shape_figures(record: dict[str, Any], speed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of a record's format, or mix of formats, at the shape of a speed record; sizes only if it was not timed."""
    format, kept = record.get("shape_format") or record.get("mix"), record.get("kept") or {}
    narrowed = any(share != 1 for name, share in kept.items() if name not in ("layers", "weights"))
    layers, stayed = kept.get("layers", 1), kept.get("weights", 1)
    if not format or (narrowed and "@" not in json.dumps(format)):  # parts are gone that the format does not tell of
        return {}
    if isinstance(format, str) and format in speed["formats"] and layers == stayed == 1:
        return speed["formats"][format]
    given = (json.dumps(format), json.dumps(speed["model"]), json.dumps(speed.get("details") or {}))
    return _computed(*given, _context(speed), layers, stayed)


def _context(speed: dict[str, Any]) -> tuple[int, str]:
    return (speed.get("params") or {}).get("context_tokens", 256), speed.get("protocol") or ""


@lru_cache(maxsize=256)
def _computed(
    format: str, model: str, details: str, context: tuple[int, str], layers: float, stayed: float
) -> dict[str, dict[str, Any]]:
    """The figures that a speed record implies but does not hold; JSON in, so that the report computes each once.

    Args:
        layers: share of the layers that is left. stayed: share of the weights that is not 0: it counts on disk alone.
    """
    from qlib.evaluate.footprint import shape_footprint
    from qlib.evaluate.whole_model import NEW_TOKENS, model_figures, rounds_of
    from qlib.models.shapes import find_shape

    try:
        whole = find_shape(json.loads(model))
        shape = replace(whole, layers=max(1, round(layers * whole.layers)))
        sizes = shape_footprint(shape, json.loads(format), stayed)
    except UserError:  # a shape or format of another version
        return {}
    try:
        conditions = context[1] if shape == whole else f"{shape.layers} layers are left; whole: {context[1]}"
        rounds = rounds_of(json.loads(details))
        return model_figures(shape, rounds, json.loads(format), context[0], NEW_TOKENS, conditions, whole=whole) | sizes
    except KeyError:  # not timed
        return sizes


def _of(speed: dict[str, Any], figure: dict[str, Any]) -> str:
    return "; ".join(filter(None, [f"shape of {speed['model']}, random weights", figure.get("conditions")]))


def joined(record: dict[str, Any], speeds: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record with the measurements of its shape among its own."""
    own = record.get("measurements", {})
    return record | {"measurements": own | shape_measurements(record, speeds)}
