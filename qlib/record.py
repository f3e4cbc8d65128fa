"""The typed result of one strategy: which measurements there are, and how a notebook writes them down."""

import io
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Mapping

from qlib.errors import UserError, nearest
from qlib.params import WITH_FORMATS
from qlib.paths import slug, write_atomic

if TYPE_CHECKING:
    from qlib.notebook import Run

__all__ = ["Measurement", "record", "UNITS", "REQUIRED", "unit_of", "plain", "check_measurements", "FORMAT"]

#: Version of the layout of result.json and record.json.
FORMAT = 1

#: Every name a measurement may have, and the unit its value is in.
UNITS = {
    "quality.accuracy": "percent",
    "quality.perplexity": "perplexity",
    "quality.bits_per_byte": "bits",
    "quality.kl": "nats",
    "quality.kl_p99": "nats",
    "quality.top1_agreement": "percent",
    "quality.accuracy_delta": "points",
    "quality.perplexity_ratio": "ratio",
    "size.disk_bytes": "bytes",
    "size.resident_bytes": "bytes",
    "size.bits_per_weight": "bits",
    "size.bits_per_weight_total": "bits",
    "size.kv_bytes_per_token": "bytes",
    "latency.prefill_ms": "ms",
    "latency.decode_ms": "ms",
    "latency.request_ms": "ms",
    "latency.prefill_speedup": "ratio",
    "latency.decode_speedup": "ratio",
    "latency.request_speedup": "ratio",
    "latency.roofline_fraction": "fraction",
    "compress.seconds": "seconds",
    "compress.peak_rss_bytes": "bytes",
    "compress.calibration_tokens": "tokens",
    "train.seconds": "seconds",
    "train.tokens_per_second": "tokens/s",
    "train.peak_rss_bytes": "bytes",
    "train.loss_difference": "nats",
    "energy.joules": "joules",
}
#: Accuracy on a hub task, e.g. ``task.arc_easy``.
TASK, TASK_UNIT = "task.", "percent"

_QUALITY = ("quality.accuracy", "quality.perplexity", "quality.bits_per_byte")
_AGAINST = ("quality.kl", "quality.top1_agreement", "quality.accuracy_delta")
_SIZE = ("size.disk_bytes", "size.resident_bytes", "size.bits_per_weight_total")
_COMPRESS = ("compress.seconds", "compress.peak_rss_bytes")
_TRAIN = ("train.seconds", "train.tokens_per_second", "train.peak_rss_bytes")
_COMPRESSED = (*_QUALITY, *_AGAINST, *_SIZE, "size.bits_per_weight", *_COMPRESS)

#: The measurements that the record of a family must hold; others of `UNITS` may be there, but are never null.
REQUIRED = {
    "baseline": (*_QUALITY, *_SIZE),
    "pruning": _COMPRESSED,
    "weight_quantization": _COMPRESSED,
    "mixed_precision": _COMPRESSED,
    "finetuning": (*_COMPRESSED, *_TRAIN),
    "combined": _COMPRESSED,
    "tool": (*_QUALITY, *_AGAINST, "size.bits_per_weight", "compress.seconds"),
    "speed": (),
    "training": (),
}
#: What `details` may hold that becomes a field of the record itself.
FIELDS = ("protocol", "shape_format", "mix", "kept", "subject", "data_sha256", "formats", "device")


@dataclass(frozen=True)
class Measurement:
    """One number and what it means.

    Args:
        value: finite. unit: as in `UNITS`.
        n: how many observations are behind it. low, high: its interval.
        method: how it was measured, in a few words. conditions: under which settings.
    """

    value: float
    unit: str
    n: int | None = None
    low: float | None = None
    high: float | None = None
    method: str = ""
    conditions: str = ""


def record(run: "Run", measurements: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check and write what the strategy measured: `result.json`, and `items.npz` if `details` has "items".

    Args:
        measurements: fixed name -> `Measurement` or a mapping with its fields.
        details: anything JSON can hold. "items" (name -> array), "protocol", "shape_format", "mix", "kept", "subject",
            "data_sha256" and, for the families speed and training, "formats" (format -> measurements) go to their own places.

    Raises:
        UserError: a name that is unknown or missing for the family, a wrong unit, a value that is not finite.
    """
    import numpy as np

    from qlib.runs.provenance import device_class

    rest = dict(details or {})
    items = rest.pop("items", None)
    strategy = run.strategy
    result = {
        "format": FORMAT,
        "name": strategy.name,
        "title": asdict(strategy.title),
        "family": strategy.family,
        "tier": strategy.tier,
        "model": slug(strategy.model),
        "device": device_class(),
        "params": run.params,
        "measurements": check_measurements(measurements, strategy.family),
        "protocol": "",
        "shape_format": None,
        "kept": {"heads": 1.0, "ffn": 1.0, "layers": 1.0},
        "subject": {},
        "data_sha256": None,
    }
    if strategy.family in WITH_FORMATS:
        formats = rest.pop("formats", None) or {}
        missing = [name for name in strategy.formats if name not in formats]
        if missing:
            raise UserError(f"formats: '{missing[0]}' is missing; the strategy names {', '.join(strategy.formats)}")
        result["formats"] = {n: check_measurements(m, None, f"formats.{n}.") for n, m in formats.items()}
    result |= {name: plain(rest.pop(name), name) for name in FIELDS if name in rest}
    result["details"] = plain(rest, "details")
    if items:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: np.asarray(array) for name, array in items.items()})
        write_atomic(run.folder / "items.npz", buffer.getvalue())
    write_atomic(run.folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def unit_of(name: str) -> str | None:
    """Unit of a measurement's name, or None if there is no such name."""
    return TASK_UNIT if name.startswith(TASK) and len(name) > len(TASK) else UNITS.get(name)


def check_measurements(measurements: Mapping[str, Any], family: str | None, path: str = "") -> dict[str, dict]:
    """The measurements as plain values.

    Args:
        family: whose required names must be there; None: no name is required.

    Raises:
        UserError: as `record`.
    """
    checked = {}
    for name, given in measurements.items():
        where = f"measurements: {path}{name}"
        if unit_of(name) is None:
            raise UserError(f"{where}: unknown name{nearest(name, UNITS)}; allowed: {', '.join(UNITS)}, {TASK}NAME")
        checked[name] = _check_one(given, unit_of(name), where)
    missing = [name for name in REQUIRED.get(family or "", ()) if name not in checked]
    if missing:
        raise UserError(f"measurements: family {family} needs {', '.join(missing)}")
    return checked


def _check_one(given: Any, unit: str, where: str) -> dict[str, Any]:
    if not isinstance(given, (Measurement, Mapping)):
        raise UserError(f"{where}: {given!r} is no Measurement")
    fields = asdict(given) if isinstance(given, Measurement) else dict(given)
    unknown = [name for name in fields if name not in Measurement.__dataclass_fields__]
    if unknown:
        raise UserError(f"{where}.{unknown[0]}: unknown field; allowed: {', '.join(Measurement.__dataclass_fields__)}")
    if "value" not in fields or fields["value"] is None:
        raise UserError(f"{where}: has no value; leave a measurement out if there is none")
    one = asdict(Measurement(**({"unit": unit} | plain(fields, where))))
    if one["unit"] != unit:
        raise UserError(f"{where}.unit: '{one['unit']}' is not allowed; allowed: {unit}")
    for field in ("value", "low", "high", "n"):
        if one[field] is not None and (isinstance(one[field], bool) or not isinstance(one[field], (int, float))):
            raise UserError(f"{where}.{field}: {one[field]!r} is no number")
    if (one["low"] is None) != (one["high"] is None) or (one["low"] is not None and one["low"] > one["high"]):
        raise UserError(f"{where}: the interval from {one['low']} to {one['high']} has no two ends in order")
    return one


def plain(value: Any, where: str) -> Any:
    """Turn numbers and arrays of numpy and torch into plain ones, tuples into lists.

    Raises:
        UserError: a number that is not finite, or something JSON cannot hold; it names where.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{where}: {value} is not a finite number")
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value), where)
    raise UserError(f"{where}: {type(value).__name__} cannot be written as JSON")
