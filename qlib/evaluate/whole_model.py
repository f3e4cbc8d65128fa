"""From the rounds of one layer and of the head to the figures of a whole model: sums, paired ratios, the floor.

Where the layers of a model differ in format, a layer's time is that of a uniform one, with the time of each linear replaced.
"""

from dataclasses import asdict, dataclass

import numpy as np

from qlib.evaluate import parts
from qlib.evaluate.footprint import Format, linear_formats, shape_footprint
from qlib.evaluate.timing import median_interval
from qlib.models.shapes import Shape
from qlib.record import Measurement

__all__ = ["BASELINE", "NEW_TOKENS", "PHASES", "Rounds", "linear_key", "rounds_of", "model_figures", "model_floor"]

BASELINE = "bf16"
PHASES = ("decode", "prefill")
NEW_TOKENS = 32  # of a request
ABSOLUTE = "median of interleaved rounds, bootstrap interval"
PAIRED = "median of ratios paired by round, bootstrap interval"


@dataclass(frozen=True)
class Rounds:
    """What was timed, one number for every round.

    Attributes:
        layer: phase -> format -> milliseconds of one layer, and of one linear of each size under `linear_key`. head: milliseconds of final norm and head for one row.
        layer_bandwidth, head_bandwidth: gigabytes per second read in the decode rounds of the layer, and of the head.
        packing: format -> seconds that rounding and packing one layer took.
    """

    layer: dict[str, dict[str, np.ndarray]]
    head: np.ndarray
    layer_bandwidth: np.ndarray
    head_bandwidth: np.ndarray
    packing: dict[str, float]

    def model(self, shape: Shape, phase: str, format: Format) -> np.ndarray:
        """Milliseconds of the whole model. A prefill computes the logits of its last token only."""
        return shape.layers * self._mean_layer(shape, self.layer[phase], format) + self.head

    def _mean_layer(self, shape: Shape, times: dict[str, np.ndarray], format: Format) -> np.ndarray:
        if isinstance(format, str):
            return times[format]
        formats = linear_formats(shape, format)
        uniform = next(one for shares in formats.values() for one in shares)
        first = parts.distinct_linears(shape)
        return times[uniform] + sum(
            share * (times[linear_key(one, first[name])] - times[linear_key(uniform, first[name])])
            for name, shares in formats.items()
            for one, share in shares.items()
            if one != uniform
        )

    def floor(self, shape: Shape, format: Format, context: int) -> np.ndarray:
        """Least milliseconds of a decode step: all bytes it must read, at the bandwidth of the same round."""
        weights = shape.layers * parts.layer_bytes(shape, format, context + 1)
        return (weights / self.layer_bandwidth + parts.head_bytes(shape) / self.head_bandwidth) / 1e6


def linear_key(format: str, name: str) -> str:
    """Under which name the rounds hold the time of one linear."""
    return f"{format} {name}"


def rounds_of(details: dict) -> Rounds:
    """The rounds as a speed record's details hold them."""
    layer, head = details["layer"], details["head"]
    return Rounds(
        {phase: {name: np.array(one) for name, one in layer[phase]["milliseconds"].items()} for phase in PHASES},
        np.array(head["milliseconds"]["head"]),
        np.array(layer["bandwidth"]),
        np.array(head["bandwidth"]),
        layer["packing_seconds"],
    )


def model_floor(
    shape: Shape, rounds: Rounds, format: Format, context: int, whole: Shape | None = None
) -> dict[str, float]:
    """Least time of a decode step, and the speed-up over a bf16 kernel that would run at its own floor (of `whole`)."""
    ideal = rounds.floor(whole or shape, BASELINE, context) / rounds.model(shape, "decode", format)
    return {
        "decode_ms": float(np.median(rounds.floor(shape, format, context))),
        "speedup_over_bf16_floor": float(np.median(ideal)),
    }


def model_figures(
    shape: Shape, rounds: Rounds, format: Format, context: int, new_tokens: int, conditions: str, seed: int = 0,
    whole: Shape | None = None,
) -> dict[str, dict]:  # fmt: skip
    """All measurements of a format or a mix: sizes, latencies with intervals, and what packing took.

    Args:
        whole: the shape of the baseline, where layers are gone.

    Raises:
        KeyError: a format, or a linear of it, was not timed.
    """
    pairs = ((shape, format), (whole or shape, BASELINE))
    own, base = ({phase: rounds.model(one, phase, name) for phase in PHASES} for one, name in pairs)
    request, base_request = (times["prefill"] + new_tokens * times["decode"] for times in (own, base))
    over_floor = model_floor(shape, rounds, format, context, whole)["speedup_over_bf16_floor"]
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
    if isinstance(format, str) and format in rounds.packing:
        seconds = shape.layers * rounds.packing[format]
        method = f"{shape.layers} x one layer, timed once: round to nearest and pack"
        found["compress.seconds"] = asdict(Measurement(seconds, "seconds", 1, method=method, conditions=conditions))
    return found
