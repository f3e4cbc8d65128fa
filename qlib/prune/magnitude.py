"""Magnitude pruning: the smallest weights of a linear go. The yardstick that looks at no data."""

from dataclasses import dataclass, field

import torch

from qlib.prune.mask import PrunedWeight
from qlib.prune.select import check_share, check_sparsity, choose_mask

__all__ = ["Options", "SCOPE", "NEEDS_FLOAT", "check", "solve"]

SCOPE = "linear"
NEEDS_FLOAT = True
PRUNES = True
check = check_sparsity


@dataclass(frozen=True)
class Options:
    """Options of a magnitude pruning pass.

    Args:
        sparsity: share of the weights of each linear that goes, at least 0 and less than 1.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs (then sparsity must be 0.5); null: no pattern.
    """

    sparsity: float = field(default=0.5, metadata={"minimum": 0})
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_share(self.sparsity)


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: None = None
) -> PrunedWeight:
    """Prune `weight` `[out, in]` by size, compared within the whole linear; what `mask` excludes stays pruned."""
    return PrunedWeight(weight, choose_mask(weight.abs().float(), options.sparsity, options.pattern, mask=mask))
