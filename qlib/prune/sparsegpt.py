"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): prune column by column; what stays makes up for what went.

In the terms of `qlib.quantize.gptq`, whose factor U this needs: a weight that stays takes the very value that its column
asks for, and its term of the error is nothing. One that goes leaves (now_j U_jj)^2, so that is how much it matters. Which go
is chosen for 128 columns at a time, among all their weights as they would now best be if none of them went; with a pattern,
for every M columns.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from qlib.errors import UserError
from qlib.prune.mask import PrunedWeight
from qlib.prune.select import check_share, check_sparsity, choose_mask, read_pattern
from qlib.quantize.gptq import BLOCK, Factor, Statistic, drifted

__all__ = ["Options", "SCOPE", "NEEDS_FLOAT", "Statistic", "check", "prune_columns", "solve"]

SCOPE = "linear"
NEEDS_FLOAT = True
PRUNES = True

LEAF = 16  # columns between two products that hand errors on


@dataclass(frozen=True)
class Options:
    """Options of a SparseGPT pass.

    Args:
        sparsity: share of the weights of every 128 input channels that goes, at least 0 and less than 1.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs (then sparsity must be 0.5); null: no pattern.
        damp: what is added to the diagonal of the Hessian, as a share of its mean; more where it cannot be factorized.
    """

    sparsity: float = field(default=0.5, metadata={"minimum": 0})
    pattern: str | None = None
    damp: float = field(default=0.01, metadata={"minimum": 0})

    def __post_init__(self) -> None:
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
        raise UserError(f"pattern: '{options.pattern}' is not allowed with sparsegpt; allowed: an M of 1, 2, 4, 8 or 16")


def prune_columns(
    weight: torch.Tensor, factor: Factor, sparsity: float, pattern: str | None = None, mask: torch.Tensor | None = None
) -> PrunedWeight:
    """Prune `weight` `[out, in]`, not modified; what `mask` excludes stays pruned and counts."""
    width = weight.shape[1]
    leaf, block = (read_pattern(pattern)[1],) * 2 if pattern else (LEAF, BLOCK)
    lost = factor.dead if mask is None else factor.dead | ~mask
    errors = weight.float().masked_fill(lost, 0).t().contiguous()  # [in, out]; w - what stays, where that is known
    moved = errors.clone()  # w_j + sum_{i<j} e_i U_ij / U_jj, complete when column j is reached; then what stays
    kept = torch.ones_like(errors, dtype=torch.bool)
    for start in range(0, width, leaf):
        span = start & -start
        before, after = slice(start - span, start), slice(start, start + span)
        moved[after].addmm_(factor.upper[before, after].t(), errors[before])
        if start % block == 0:
            here = slice(start, start + block)
            scores = (drifted(factor, moved, errors, here).square() * factor.pivots[here, None]).t().contiguous()
            kept[here] = choose_mask(scores, sparsity, pattern, mask=None if mask is None else mask[:, here]).t()
        for j in range(start, min(start + leaf, width)):
            now = moved[j].addmv_(errors[start:j].t(), factor.upper[start:j, j]).mul_(kept[j])
            errors[j] -= now
    return PrunedWeight(moved.t().contiguous(), kept.t().contiguous())


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: Statistic | None = None
) -> PrunedWeight:
    """Prune `weight` `[out, in]` so that the outputs for the inputs fed change least.

    Raises:
        UserError: nothing was fed, or the Hessian cannot be factorized.
    """
    if statistic is None:
        raise UserError("calibration: SparseGPT needs text to compare outputs on; give the inputs of the linear")
    return prune_columns(weight, statistic.factor(options.damp), options.sparsity, options.pattern, mask)
