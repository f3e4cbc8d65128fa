"""Round-to-nearest: every weight goes to the closest code of its group. The yardstick every other method must beat."""

from dataclasses import dataclass

import torch

from qlib.quantize import clip
from qlib.quantize.formats import GridOptions
from qlib.quantize.grid import CompressedWeight, round_to_grid

__all__ = ["Options", "SCOPE", "Statistic", "feeds", "solve"]

SCOPE = "linear"


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a round-to-nearest pass: those of every grid."""


class Statistic:
    """Mean square of every input channel, a running mean, so that the sum stays in range however much is fed.

    Attributes:
        squares: fp32 `[in]`; None before anything was fed.
    """

    def __init__(self, width: int, options: Options):
        self.free()

    def feed(self, inputs: torch.Tensor) -> None:
        """Add inputs `[tokens, in]`."""
        self.tokens += len(inputs)
        mean = inputs.float().square().sum(0) / self.tokens
        self.squares = mean if self.squares is None else mean + self.squares * (1 - len(inputs) / self.tokens)

    def free(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self.squares: torch.Tensor | None = None


def feeds(options: Options) -> bool:
    """Whether the options weigh errors by the inputs, so that calibration text is needed."""
    return options.clip == "activations"


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: Statistic | None = None
) -> CompressedWeight:
    """Round `weight` `[out, in]` onto the grid of the options; 0 has a code of its own, so a mask's zeros stay.

    Raises:
        UserError: clip activations, but nothing was fed.
    """
    weight = weight if mask is None else weight.masked_fill(~mask, 0)
    importance = None if statistic is None else statistic.squares
    return round_to_grid(weight, options.grid, *clip.fit(weight, options.grid, options.clip, importance))
