"""Round-to-nearest: every weight goes to the closest code of its group. The yardstick every other method must beat."""

from dataclasses import dataclass

import torch

from qlib.quantize.formats import GridOptions
from qlib.quantize.grid import CompressedWeight, fit_grid, round_to_grid

__all__ = ["Options", "SCOPE", "solve"]

SCOPE = "linear"


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a round-to-nearest pass: those of every grid."""


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: None = None
) -> CompressedWeight:
    """Round `weight` `[out, in]` onto the grid of the options; 0 has a code of its own, so a mask's zeros stay."""
    return round_to_grid(weight, options.grid, *fit_grid(weight, options.grid))
