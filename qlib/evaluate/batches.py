"""The linears of one layer for several rows of activations at a time: decoding for as many requests at once."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from qlib.evaluate import parts
from qlib.evaluate.timing import median_interval, time_rounds
from qlib.evaluate.whole_model import linear_key
from qlib.models.shapes import Shape

__all__ = ["BATCHES", "linear_calls", "batch_rounds", "time_batches"]

BATCHES = (1, 4, 16, 64)
ROUNDS = 5


def linear_calls(
    shape: Shape, format: str, layers: Sequence[nn.Module], rows: int, device: torch.device, generator: torch.Generator
) -> dict[str, list]:
    """Calls of one linear of each size, as `linear_key` names them, one for each of the layers."""
    calls = {}
    for name in dict.fromkeys(parts.distinct_linears(shape).values()):
        x = parts.random_tensor((1, rows, shape.linears[name][1]), device, generator, scale=1.0)
        calls[linear_key(format, name)] = [_call(layer.get_submodule(name), x) for layer in layers]
    return calls


def _call(linear: nn.Module, x: torch.Tensor):
    return lambda: linear(x)


def batch_rounds(
    shape: Shape, layers: Mapping[str, Sequence[nn.Module]], rows: int, device: torch.device,
    generator: torch.Generator, rounds: int = ROUNDS,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Milliseconds of all linears of a layer for `rows` rows, format -> `[rounds]`, the formats interleaved.

    Args:
        layers: format -> copies of one layer of this shape.
    """
    calls, first = {}, parts.distinct_linears(shape).values()
    for format, copies in layers.items():
        calls |= linear_calls(shape, format, copies, rows, device, generator)
    timed = time_rounds(calls, rounds, device).rounds
    return {format: sum(timed[linear_key(format, one)] for one in first) for format in layers}


def time_batches(
    shape: Shape, layers: Mapping[str, Sequence[nn.Module]], device: torch.device, generator: torch.Generator
) -> dict[str, dict[str, dict]]:
    """Milliseconds of all linears of a layer for each of `BATCHES`, without attention, which is each request's own.

    Returns:
        batch -> format -> value, low, high (median of rounds that interleave the formats, bootstrap interval) and the
        kernel of the layer's largest linear.
    """
    found: dict[str, dict[str, dict]] = {}
    largest = max(shape.linears, key=lambda name: np.prod(shape.linears[name]))
    for rows in BATCHES:
        found[str(rows)] = {}
        for format, times in batch_rounds(shape, layers, rows, device, generator).items():
            value, low, high = median_interval(times)
            kernel = parts.kernels(layers[format][0], shape, rows)[largest]
            found[str(rows)][format] = {"value": value, "low": low, "high": high, "kernel": kernel}
    return found
