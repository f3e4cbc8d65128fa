"""Prune and round in one solve (Frantar and Alistarh 2023, arXiv:2301.00774, section 3.5).

SparseGPT with a grid: of every 128 columns, or every M with a pattern, the weights that matter least go; each column of those that
stay is then rounded as in GPTQ, and both errors, what went and what was rounded, are made up for by the columns to the
right in one go. Scales and zeros are fitted to what pruning alone would leave of their group.

With the same masks, pruning first and rounding what is left with the same Hessian gives the same codes: a column asks for
its weight and its share of all errors before it, in whatever order those were made. What one solve gains is that what goes
is chosen in the knowledge of rounding errors, and half of the passes over the weights.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from qlib.errors import UserError
from qlib.prune.select import check_share, check_sparsity, choose_mask, read_pattern
from qlib.prune.sparsegpt import prune_columns
from qlib.quantize.formats import GridOptions
from qlib.quantize.gptq import BLOCK, LEAF, Statistic, solve_columns
from qlib.quantize.grid import CompressedWeight

__all__ = ["Options", "SCOPE", "NEEDS_FLOAT", "Statistic", "check", "solve"]

SCOPE = "linear"
NEEDS_FLOAT = True
PRUNES = True


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a joint pass, beside those of every grid.

    Args:
        sparsity: share of the weights of every 128 input channels that goes, at least 0 and less than 1.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs (then sparsity must be 0.5); null: no pattern.
        damp: what is added to the diagonal of the Hessian, as a share of its mean; more where it cannot be factorized.
    """

    sparsity: float = field(default=0.5, metadata={"minimum": 0})
    pattern: str | None = None
    damp: float = field(default=0.01, metadata={"minimum": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.sparsity)


def check(subject: Any, options: Options) -> None:
    """Refuse what no mask can have, and patterns whose groups would not be met whole.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    check_sparsity(subject, options)
    if options.damp < 0:
        raise UserError(f"damp: {options.damp} is not allowed; allowed: at least 0")
    if options.pattern and LEAF % read_pattern(options.pattern)[1]:
        raise UserError(f"pattern: '{options.pattern}' is not allowed with joint; allowed: an M of 1, 2, 4, 8 or 16")


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: Statistic | None = None
) -> CompressedWeight:
    """Prune and round `weight` `[out, in]`; what `mask` excludes stays pruned and counts.

    Raises:
        UserError: nothing was fed, or the Hessian cannot be factorized.
    """
    if statistic is None:
        raise UserError("calibration: joint pruning needs text to compare outputs on; give the inputs of the linear")
    factor = statistic.factor(options.damp)

    def choose(matters: torch.Tensor, here: slice) -> torch.Tensor:
        earlier = None if mask is None else mask[:, here]
        return choose_mask(matters, options.sparsity, options.pattern, mask=earlier)

    like, size = None, weight.shape[1] // options.grid.groups(weight.shape[1])
    if size > BLOCK:  # what goes is not known when the scale of a whole row is fitted: prune once without rounding
        like = prune_columns(weight, factor, options.sparsity, options.pattern, mask).dequantize()
    together = read_pattern(options.pattern)[1] if options.pattern else BLOCK
    return solve_columns(weight, factor, options.grid, options.clip, mask, choose, like, together)
