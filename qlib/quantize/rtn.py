"""Round-to-nearest: every weight goes to the closest code of its group. The yardstick every other method must beat."""

from dataclasses import dataclass
from typing import Literal

import torch

from qlib.quantize.grid import CompressedWeight, Grid, fit_grid, round_to_grid

__all__ = ["Options", "SCOPE", "solve"]

SCOPE = "linear"


@dataclass(frozen=True)
class Options:
    """Options of a round-to-nearest pass.

    Args:
        bits: width of a code.
        group_size: input channels that share a scale; null: one scale per output channel.
        symmetric: keep the middle code for zero instead of fitting a zero per group.
    """

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] | None = 128
    symmetric: bool = False

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: None = None
) -> CompressedWeight:
    """Round `weight` `[out, in]` onto the grid of the options; 0 has a code of its own, so a mask's zeros stay."""
    return round_to_grid(weight, options.grid, *fit_grid(weight, options.grid))
