"""The extrapolation checked on a model small enough to be run whole: layers x one layer + head against all of it.

What is run whole is too large for the caches, as the large model is; its parts are its own layers and its own head, timed in
the same rounds. Compressing is compared likewise: several layers against as many times one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from qlib.evaluate import parts
from qlib.evaluate.fastest import fastest_form
from qlib.evaluate.roofline import last_level_cache
from qlib.evaluate.timing import exclusive, median_interval, time_rounds
from qlib.evaluate.whole_model import BASELINE
from qlib.layers.decode import Decoder
from qlib.models.shapes import SHAPES, Shape, find_shape
from qlib.record import Measurement
from qlib.bench.child import in_child
from qlib.scale.layer import cost_of
from qlib.scale.methods import METHODS

__all__ = ["peers", "whole_peer", "check_speed", "check_compression", "CHECKED"]

CPU = torch.device("cpu")
#: The layers in the smallest format must be so many times the last-level cache, and the whole in bf16 at most so large.
PAST_CACHE, MOST_BYTES = 4, 4e9
#: Methods whose time is checked, on how many layers, how often.
CHECKED, LAYERS, REPEATS = ("rtn-int4", "gptq-int4"), 4, 3


def peers(model: str) -> list[str]:
    """The published shapes up to the size of `model` or hardly larger, the smallest first, `model` among them."""
    shape = find_shape(model)
    known = [one for one in SHAPES.values() if one.parameters < 1.05 * shape.parameters and one.name != shape.name]
    return [one.name for one in sorted([*known, shape], key=lambda one: one.parameters)]


def whole_peer(model: str, formats: Sequence[str], cache: int | None = None) -> str:
    """The smallest peer whose layers do not fit into the cache in any format; else the largest that can be held whole."""
    shapes = [shape for shape in map(find_shape, peers(model)) if parts.BF16 * shape.parameters <= MOST_BYTES]
    shapes = shapes or [find_shape(model)]
    least = PAST_CACHE * (last_level_cache() if cache is None else cache)
    large = (one for one in shapes if one.layers * min(parts.layer_bytes(one, format) for format in formats) > least)
    return next(large, shapes[-1]).name


@torch.inference_mode()
def check_speed(
    model: str, formats: Sequence[str], prompt_tokens: int, context_tokens: int, rounds: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Prefill and decode of a whole model against layers x layer + head.

    Returns:
        ``FORMAT PHASE`` -> milliseconds of the whole and of the sum, and their ratio paired by round, as measurements.
    """
    shape, random = find_shape(model), torch.Generator().manual_seed(seed)
    found = {}
    with exclusive():
        form, _ = fastest_form(parts.random_tensor(shape.linears["mlp.gate_proj"], CPU, random), 1)
        names = dict.fromkeys([BASELINE, *formats])
        models = {format: parts.build_model(shape, format, form, random) for format in names}
        for phase, (new, context) in {"decode": (1, context_tokens), "prefill": (prompt_tokens, 0)}.items():
            calls: dict[str, list] = {}
            for format, whole in models.items():
                calls |= _calls(shape, format, whole, new, context, random)
            timed = time_rounds(calls, rounds, CPU).rounds
            found |= {f"{format} {phase}": _compared(shape, timed, format, seed) for format in models}
    return found


def _calls(
    shape: Shape, format: str, model: nn.Module, new: int, context: int, random: torch.Generator
) -> dict[str, list]:
    """The whole model, each of its layers, and final norm and head."""
    decoder, ids = Decoder(model, context + new), torch.zeros(new, dtype=torch.long)
    decoder.own = None  # block by block, as the parts are timed
    works = [parts.Workload(shape, new, context, CPU, random) for _ in range(shape.layers)]
    x = parts.random_tensor((1, shape.hidden), CPU, random, scale=1.0)
    return {
        f"{format} whole": [partial(_step, decoder, ids, context)],
        f"{format} layer": [partial(work.run, layer) for work, layer in zip(works, model.model.layers)],
        f"{format} head": [lambda: model.lm_head(model.model.norm(x))],
    }


def _step(decoder: Decoder, ids: torch.Tensor, context: int) -> torch.Tensor:
    decoder.rewind(context)
    return decoder(ids)


def _compared(shape: Shape, timed: dict[str, np.ndarray], format: str, seed: int) -> dict[str, Any]:
    whole, layer, head = (timed[f"{format} {part}"] for part in ("whole", "layer", "head"))
    summed = shape.layers * layer + head
    how = f"{shape.name}, {shape.layers} layers; packed formats with int8 embedding and head"
    return {
        "whole": _measured(whole, "ms", "all layers and head, one after the other", how, seed),
        "sum": _measured(summed, "ms", f"{shape.layers} x one layer + head", how, seed),
        "ratio": _measured(whole / summed, "ratio", "whole / sum, paired by round", how, seed),
    }


def _measured(values: np.ndarray, unit: str, method: str, conditions: str, seed: int) -> Measurement:
    value, low, high = median_interval(values, seed)
    return Measurement(value, unit, len(values), low, high, f"median of {method}", conditions)


def check_compression(model: str, samples: int, length: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Seconds of compressing several layers against as many times one, taking turns.

    Returns:
        method -> whole and sum in seconds, and their ratio, as measurements.
    """
    shape = find_shape(model)
    with exclusive():
        return {
            name: in_child(_turns, shape, list(METHODS[name].recipe), samples, length, seed) for name in CHECKED
        }


def _turns(shape: Shape, recipe: list[dict[str, Any]], samples: int, length: int, seed: int) -> dict[str, Any]:
    times: dict[int, list[float]] = {1: [], LAYERS: []}
    for turn in range(REPEATS + 1):
        for layers in times if turn % 2 else reversed(times):
            times[layers].append(cost_of(shape, recipe, samples, length, seed, layers).seconds)
    several, one = (np.array(times[layers][1:]) for layers in (LAYERS, 1))  # the first turn loads libraries
    how = f"{shape.name}, {LAYERS} layers, {samples} x {length} tokens"
    return {
        "whole": _measured(several, "seconds", f"{LAYERS} layers", how, seed),
        "sum": _measured(LAYERS * one, "seconds", f"{LAYERS} x one layer", how, seed),
        "ratio": _measured(several / (LAYERS * one), "ratio", "whole / sum, paired by turn", how, seed),
    }
