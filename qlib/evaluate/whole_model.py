"""From the rounds of one layer and of the head to the figures of a whole model: sums, paired ratios, the floor."""

from dataclasses import asdict, dataclass

import numpy as np

from qlib.evaluate import parts
from qlib.evaluate.footprint import shape_footprint
from qlib.evaluate.timing import median_interval
from qlib.models.shapes import Shape
from qlib.record import Measurement

__all__ = ["BASELINE", "PHASES", "Rounds", "model_figures", "model_floor"]

BASELINE = "bf16"
PHASES = ("decode", "prefill")
ABSOLUTE = "median of interleaved rounds, bootstrap interval"
PAIRED = "median of ratios paired by round, bootstrap interval"


@dataclass(frozen=True)
class Rounds:
    """What was timed, one number for every round.

    Attributes:
        layer: phase -> format -> milliseconds of one layer. head: milliseconds of final norm and head for one row.
        layer_bandwidth, head_bandwidth: gigabytes per second read in the decode rounds of the layer, and of the head.
        packing: format -> seconds that rounding and packing one layer took.
    """

    layer: dict[str, dict[str, np.ndarray]]
    head: np.ndarray
    layer_bandwidth: np.ndarray
    head_bandwidth: np.ndarray
    packing: dict[str, float]

    def model(self, shape: Shape, phase: str, format: str) -> np.ndarray:
        """Milliseconds of the whole model. A prefill computes the logits of its last token only."""
        return shape.layers * self.layer[phase][format] + self.head

    def floor(self, shape: Shape, format: str, context: int) -> np.ndarray:
        """Least milliseconds of a decode step: all bytes it must read, at the bandwidth of the same round."""
        weights = shape.layers * parts.layer_bytes(shape, format, context + 1)
        return (weights / self.layer_bandwidth + parts.head_bytes(shape) / self.head_bandwidth) / 1e6


def model_floor(shape: Shape, rounds: Rounds, format: str, context: int) -> dict[str, float]:
    """Least time of a decode step, and the speed-up over a bf16 kernel that would run at its own floor."""
    ideal = rounds.floor(shape, BASELINE, context) / rounds.model(shape, "decode", format)
    return {
        "decode_ms": float(np.median(rounds.floor(shape, format, context))),
        "speedup_over_bf16_floor": float(np.median(ideal)),
    }


def model_figures(
    shape: Shape, rounds: Rounds, format: str, context: int, new_tokens: int, conditions: str, seed: int = 0
) -> dict[str, dict]:
    """All measurements of a format: sizes, latencies with intervals, and what packing took."""
    own, base = ({phase: rounds.model(shape, phase, name) for phase in PHASES} for name in (format, BASELINE))
    request, base_request = (times["prefill"] + new_tokens * times["decode"] for times in (own, base))
    over_floor = model_floor(shape, rounds, format, context)["speedup_over_bf16_floor"]
    notes = {"latency.decode_speedup": f"{over_floor:.2f} x against a bf16 kernel at the bandwidth measured; "}
    share = rounds.floor(shape, format, context) / own["decode"]
    rows = [
        ("latency.prefill_ms", own["prefill"], "ms", ABSOLUTE),
        ("latency.decode_ms", own["decode"], "ms", ABSOLUTE),
        ("latency.request_ms", request, "ms", f"prefill + {new_tokens} x decode; {ABSOLUTE}"),
        ("latency.prefill_speedup", base["prefill"] / own["prefill"], "ratio", PAIRED),
        ("latency.decode_speedup", base["decode"] / own["decode"], "ratio", PAIRED),
        ("latency.request_speedup", base_request / request, "ratio", PAIRED),
        ("latency.roofline_fraction", share, "fraction", "bytes that must be read / read bandwidth / time, by round"),
    ]
    found = shape_footprint(shape, format)
    for name, values, unit, method in rows:
        value, low, high = median_interval(values, seed)
        words = notes.get(name, "") + conditions
        found[name] = asdict(Measurement(value, unit, len(values), low, high, method, words))
    if format in rounds.packing:
        seconds = shape.layers * rounds.packing[format]
        method = f"{shape.layers} x one layer, timed once: round to nearest and pack"
        found["compress.seconds"] = asdict(Measurement(seconds, "seconds", 1, method=method, conditions=conditions))
    return found
