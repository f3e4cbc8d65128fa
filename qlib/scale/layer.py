"""One layer of a true shape, random weights, compressed once by every method: seconds, peak memory, size.

Whether a method is affordable is foretold from narrower layers of the same proportions: work grows at least with the square of
the width, that is with the number of weights, and at most with its cube, where a Hessian is factorized. What would take too
long is not measured, and the record says why.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlib.bench.subjects import random_windows, shaped_model
from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.footprint import measure_footprint
from qlib.evaluate.memory import anonymous_bytes
from qlib.evaluate.timing import exclusive
from qlib.models.shapes import FFN_STEP, Shape, find_shape
from qlib.progress import clock
from qlib.bench.child import in_child
from qlib.scale.methods import METHODS, Method

__all__ = ["Limits", "Cost", "compress_layer", "foretell", "cost_of", "narrower", "foretold", "VOCAB"]

#: Token ids are drawn below this, and the model around the layer has no more: only the layer is of true shape.
VOCAB = 4096
#: By how much narrower the layers are that foretell the time of a whole one; the first only warms up.
NARROWER = (64, 16, 8)
#: Exponent of a time in the number of weights: at least, at most.
POWERS = (1.0, 1.5)
#: From so many times the limit on, one narrower layer is enough; below, what it takes may be the cost of calls.
FAR = 3


@dataclass(frozen=True)
class Limits:
    """What a method may take for a layer, in seconds. Of layers below so many weights it is not foretold."""

    seconds: float = 330
    weights: float = 20e6


@dataclass(frozen=True)
class Cost:
    """What compressing one layer took.

    Attributes:
        parameters: of the layer. seconds: wall time. before_bytes: anonymous memory before, the layer included.
        peak_bytes: what came on top at most. tokens: of calibration.
        bits_per_weight, stored_bytes: of the linears as stored. weights_kept: share of their weights that is not 0.
        format: name of the number format that is left, with what width pruning keeps.
    """

    parameters: int
    seconds: float
    before_bytes: int
    peak_bytes: int
    tokens: int
    bits_per_weight: float
    stored_bytes: int
    weights_kept: float
    format: str


def compress_layer(
    model: str,
    samples: int,
    length: int,
    seed: int = 0,
    device: str = "cpu",
    methods: Mapping[str, Method] = METHODS,
    limits: Limits = Limits(),
) -> dict[str, dict[str, Any]]:
    """Compress one layer by every method, each once and in a process of its own, on random token ids.

    Args:
        model: the name of a shape. samples, length: of calibration.

    Returns:
        name -> title, family, recipe, what was foretold and, as measured, the fields of `Cost`; or `reason`, why it was not.

    Raises:
        UserError: an unknown model, or a device other than the CPU.
    """
    if device != "cpu":
        raise UserError(f"device: '{device}' is not allowed here, layers are compressed on the CPU; allowed: cpu")
    shape = find_shape(model)
    with exclusive():
        return {name: _one(shape, method, samples, length, seed, limits) for name, method in methods.items()}


def _one(shape: Shape, method: Method, samples: int, length: int, seed: int, limits: Limits) -> dict[str, Any]:
    found: dict[str, Any] = {"title": method.title, "family": method.family, "recipe": list(method.recipe)}
    if method.never:
        return found | {"reason": method.never}
    given = (list(method.recipe), samples, length, seed)
    if shape.layer_parameters >= limits.weights:
        narrow, expected = in_child(foretell, shape, limits.seconds, *given)
        found |= {"narrower": [asdict(cost) for cost in narrow], "foretold_seconds": expected, "format": narrow[-1].format}
        if expected > limits.seconds:
            times = f"{narrow[-1].seconds:.3g} s for {narrow[-1].parameters / 1e6:.1f} million weights"
            return found | {"reason": f"would take about {clock(expected)}, more than {clock(limits.seconds)}: {times}"}
    return found | asdict(in_child(cost_of, shape, *given))


def foretell(shape: Shape, limit: float, *given: Any) -> tuple[list[Cost], float]:
    """Costs of narrower layers and the seconds that they foretell for `shape`; ends early where these are far above the limit.

    Args:
        given: what `cost_of` takes beside the shape.
    """
    cost_of(narrower(shape, NARROWER[0]), *given)
    costs, expected = [], 0.0
    for by in NARROWER[1:]:
        costs.append(cost_of(narrower(shape, by), *given))
        expected = foretold(costs, shape.layer_parameters)
        if expected > FAR * limit:
            break
    return costs, expected


def cost_of(shape: Shape, recipe: list[dict[str, Any]], samples: int, length: int, seed: int = 0, layers: int = 1) -> Cost:
    """Build `layers` layers of random weights and compress them. Sizes and parameters are those of all of them."""
    subject = shaped_model(shape, layers, VOCAB, seed)
    windows, before = random_windows(samples, length, VOCAB, seed), anonymous_bytes()
    subject = compress(subject, recipe, windows, seed)
    costs, details = subject.measurements, subject.details
    bits = measure_footprint(subject.model)["size.bits_per_weight"]["value"]
    kept = details.get("kept", {})
    left = shape.narrowed(kept["heads"], kept["ffn"]) if kept else shape
    tokens = costs.get("compress.calibration_tokens")
    return Cost(
        layers * shape.layer_parameters,
        costs["compress.seconds"].value,
        before,
        max(int(costs["compress.peak_rss_bytes"].value) - before, 0),
        tokens.value if tokens else 0,
        bits,
        round(bits * layers * left.linear_parameters / 8),
        kept.get("weights", 1.0),
        details["shape_format"],
    )


def narrower(shape: Shape, by: int) -> Shape:
    """A layer of the same proportions whose width is `by` times smaller, in steps that groups of weights fit into."""
    hidden, ffn = (max(round(width / by / FFN_STEP), 1) * FFN_STEP for width in (shape.hidden, shape.ffn))
    shared = shape.heads // shape.kv_heads
    step = FFN_STEP // math.gcd(FFN_STEP, shared * shape.head_dim)
    kv_heads = max(round(shape.kv_heads / by / step), 1) * step
    return replace(shape, hidden=hidden, ffn=ffn, heads=kv_heads * shared, kv_heads=kv_heads)


def foretold(costs: Sequence[Cost], parameters: int) -> float:
    """Seconds of a layer of `parameters` weights: by the power law through two narrower ones, or in proportion to one of them."""
    least, most = POWERS
    power = least
    if len(costs) > 1 and costs[-2].parameters < costs[-1].parameters:
        first, last = costs[-2:]
        power = math.log(last.seconds / first.seconds) / math.log(last.parameters / first.parameters)
    return costs[-1].seconds * (parameters / costs[-1].parameters) ** min(max(power, least), most)
