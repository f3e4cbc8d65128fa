"""Wanda (Sun et al. 2023, arXiv 2306.11695): a weight matters as much as what it multiplies; no weight is changed."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from qlib.prune.mask import PrunedWeight
from qlib.prune.select import check_share, check_sparsity, choose_mask

__all__ = ["Options", "SCOPE", "NEEDS_FLOAT", "Statistic", "check", "scores", "solve"]

SCOPE = "linear"
NEEDS_FLOAT = True
PRUNES = True
check = check_sparsity
ROWS = 1024  # tokens that are squared in fp32 at a time


@dataclass(frozen=True)
class Options:
    """Options of a Wanda pass.

    Args:
        sparsity: share of the weights that goes, at least 0 and less than 1.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs (then sparsity must be 0.5); null: no pattern.
        compare: the weights of each output with each other, as in the paper, or those of the whole linear.
    """

    sparsity: float = field(default=0.5, metadata={"minimum": 0})
    pattern: str | None = None
    compare: Literal["output", "linear"] = "output"

    def __post_init__(self) -> None:
        check_share(self.sparsity)


class Statistic:
    """Norm of every input channel over all calibration tokens."""

    def __init__(self, width: int, options: Options) -> None:
        self.squares: torch.Tensor | None = torch.zeros(width, dtype=torch.float64)

    def feed(self, inputs: torch.Tensor) -> None:
        """Add a batch `[tokens, in]`."""
        total = sum(part.float().square().sum(0) for part in inputs.split(ROWS))
        self.squares = self.squares.to(inputs.device) + total

    @property
    def norms(self) -> torch.Tensor:
        """||x|| of each channel, `[in]`, float64."""
        return self.squares.sqrt()

    def free(self) -> None:
        self.squares = None


def scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """|w| ||x||, `[out, in]` in fp32."""
    return weight.abs().float().mul_(norms.float())


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: Statistic | None = None
) -> PrunedWeight:
    """Prune `weight` `[out, in]` by score; what `mask` excludes stays pruned."""
    by_row = options.compare == "output"
    chosen = choose_mask(scores(weight, statistic.norms), options.sparsity, options.pattern, by_row, mask)
    return PrunedWeight(weight, chosen)
