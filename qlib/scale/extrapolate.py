"""From one compressed layer to the whole model: layers x layer + head, and labelled so."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qlib.evaluate.footprint import shape_footprint
from qlib.models.shapes import find_shape
from qlib.record import Measurement

__all__ = ["formats_left", "extrapolated"]


def formats_left(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The number formats that the methods leave, each once."""
    return list(dict.fromkeys(one["format"] for one in methods.values() if "format" in one))


def extrapolated(
    model: str, methods: Mapping[str, Mapping[str, Any]], timed: Mapping[str, Mapping[str, dict]]
) -> dict[str, dict[str, Any]]:
    """Measurements of the whole model by method, under the record's names; none of a method whose format is not known.

    Args:
        methods: as `compress_layer` returns them. timed: format -> measurements of the whole model.
    """
    shape, found = find_shape(model), {}
    for name, one in methods.items():
        if "format" not in one:
            continue
        found[name] = dict(timed[one["format"]])
        found[name].pop("compress.seconds", None)  # that of rounding to nearest, whatever the method
        if "seconds" in one:
            found[name] |= shape_footprint(shape, one["format"], one["weights_kept"]) | _costs(shape.layers, one)
    return found


def _costs(layers: int, one: Mapping[str, Any]) -> dict[str, dict]:
    """What compressing takes: the time of all layers, and the memory of one, which is all that a stream holds at a time."""
    calibration = f"{one['tokens']} random calibration tokens" if one["tokens"] else "no calibration"
    how = f"one layer of true shape, random weights, {calibration}; measured once"
    seconds = f"extrapolated to {layers} layers: {layers} x the time of one; the head stays as it is"
    memory = f"anonymous memory beyond the {one['before_bytes'] / 1e9:.1f} GB that were there, the layer among them"
    found = {
        "compress.seconds": Measurement(layers * one["seconds"], "seconds", 1, method=seconds, conditions=how),
        "compress.peak_rss_bytes": Measurement(one["peak_bytes"], "bytes", 1, method=memory, conditions=how),
    }
    if one["tokens"]:
        found["compress.calibration_tokens"] = Measurement(one["tokens"], "tokens", 1, method="token ids fed to the passes")
    return {name: asdict(measured) for name, measured in found.items()}
