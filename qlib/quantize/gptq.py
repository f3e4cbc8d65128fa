"""GPTQ (Frantar et al. 2022): round column by column; each column makes up for the errors of those before it.

For inputs X the squared error ||X (W - Q)^T||^2 of a linear is, row by row, e H e^T with e = w - q and H = X^T X. With
the Cholesky factor H = U U^T, U upper triangular, it is a sum with one term for each column,

    sum_j (e_j U_jj + sum_{i<j} e_i U_ij)^2,

and no term knows a later column. So go from left to right and make each term as small as the grid allows: round
w_j + sum_{i<j} e_i U_ij / U_jj. The paper moves all later columns by rows of the inverse of H instead. That both give
the same codes was shown by Chee et al. 2023 (QuIP, arXiv:2307.13304) and Chen et al. 2025 (Babai's nearest plane
algorithm, arXiv:2507.18553); this way takes one factorization where that takes three. One factor serves all rows, and
all linears that read the same inputs.
"""

from dataclasses import dataclass, field, replace
from typing import Callable

import torch

from qlib.errors import UserError
from qlib.layers import native
from qlib.quantize.clip import fit
from qlib.quantize.formats import GridOptions
from qlib.quantize.grid import CompressedWeight, Grid, nearest_codes, nearest_steps, scale_values
from qlib.quantize.hessian import Factor, Statistic, factorize

__all__ = ["Options", "SCOPE", "Statistic", "Factor", "factorize", "drifted", "solve_columns", "solve", "BLOCK", "LEAF"]

SCOPE = "linear"
TOGETHER = True

BLOCK = 128  # columns whose weights are compared with each other, where some are to go
LEAF = 16  # columns between two matrix products that hand errors on: the smallest group size, a power of two


Choice = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a GPTQ pass, beside those of every grid.

    Args:
        damp: what is added to the diagonal of the Hessian, as a share of its mean; more where it cannot be factorized.
        act_order: start with the columns of the largest inputs; all scales are then fitted to the original weights,
            because the columns of a group are not met together.
        true_sequential: feed the linears of a block one group after the other, through those already rounded.
    """

    damp: float = field(default=0.01, metadata={"minimum": 0})
    act_order: bool = False
    true_sequential: bool = False


def drifted(factor: Factor, moved: torch.Tensor, errors: torch.Tensor, here: slice) -> torch.Tensor:
    """What columns `here` `[columns, out]` would best be now, if none of them had an error of its own.

    Args:
        moved, errors: as in `solve_columns`; `moved` has heard of all columns before these.
    """
    drift = torch.linalg.solve_triangular(
        factor.upper[here, here].t(), moved[here] - errors[here], upper=False, unitriangular=True
    )
    return errors[here] + drift


def solve_columns(
    weight: torch.Tensor,
    factor: Factor,
    grid: Grid,
    clip: str = "none",
    mask: torch.Tensor | None = None,
    choose: Choice | None = None,
    like: torch.Tensor | None = None,
    together: int = BLOCK,
) -> CompressedWeight:
    """Round a weight column by column.

    Scales and zeros of a group are fitted when its first column is reached, to what its weights would best be then if
    they needed no rounding; with an order to the original weights, because a group's columns are not met together.

    A weight that was pruned keeps the zero's code. What earlier columns moved into its place is handed on to those that
    are left, as in SparseGPT (Frantar and Alistarh 2023): one factor still serves all rows, whatever their masks.

    Args:
        weight: `[out, in]`, not modified.
        clip: see `qlib.quantize.clip`.
        mask: bool `[out, in]`, false where a weight was pruned.
        choose: called before every `together` columns are rounded, with what each of their weights matters now (not
            negative, `[out, columns]`) and which columns they are; returns which of them stay. Also before the first of a
            larger group, for all of it: its scale must suit what will stay. From left to right only.
        like: `[out, in]`, what groups that are not fitted on the way are fitted to; None: the weight.
    """
    width, size = weight.shape[1], weight.shape[1] // grid.groups(weight.shape[1])
    weight = weight.float().masked_fill(factor.dead if mask is None else factor.dead | ~mask, 0)
    leaf = LEAF if choose is None else min(LEAF, together)
    one = size == width and (choose is None or width > BLOCK)
    static = factor.order is not None or one  # no group is fitted on the way
    fitted = fit(weight if like is None else like, grid, clip if static else "none", factor.energy)
    scales = scale_values(fitted.scales, fitted.tensor_scale).t().contiguous()  # [groups, out]
    zeros = fitted.zeros.float().t().contiguous()
    order = torch.arange(width, device=weight.device) if factor.order is None else factor.order
    group_of = order // size
    groups = group_of.tolist()
    own = grid.element == "int" and not grid.real_zero and native.takes(weight.device, len(weight), 1)
    # [in, out]; w where a column has not been rounded, w - q where it has
    errors = _ordered(weight.t().contiguous(), factor.order)
    del weight
    moved = errors.clone()  # w_j + sum_{i<j} e_i U_ij / U_jj, complete when column j is reached; then steps, or codes
    kept = None if mask is None else mask.t()[order].contiguous()
    if choose is not None:
        kept = torch.ones_like(errors, dtype=torch.bool)
    for start in range(0, width, leaf):
        # Columns from `start` on now hear of as many before it as the largest power of two that divides it. So each
        # hears of every earlier one once and in time, and most of the work is done in large products.
        span = start & -start
        before, after = slice(start - span, start), slice(start, start + span)
        moved[after].addmm_(factor.upper[before, after].t(), errors[before])
        group_starts = not static and start % size == 0
        if choose is not None and start % together == 0:
            here = slice(start, start + (max(size, together) if group_starts else together))
            matters = drifted(factor, moved, errors, here).square() * factor.pivots[here, None]
            kept[here] = choose(matters.t().contiguous(), here).t()
        if group_starts:
            here, group = slice(start, start + size), start // size
            if choose is not None:
                best = _left(factor, moved, errors, kept, here)
            else:
                best = drifted(factor, moved, errors, here)
                best = best if kept is None else best.masked_fill(~kept[here], 0)
            told = (replace(grid, group_size=None), clip, factor.energy[here], fitted.tensor_scale)
            found = fit(best.t().contiguous(), *told)
            fitted.scales[:, group], fitted.zeros[:, group] = found.scales[:, 0], found.zeros[:, 0]
            scales[group] = scale_values(found.scales[:, 0], found.tensor_scale)
            zeros[group] = found.zeros[:, 0]
        if own:
            here = slice(start, start + leaf)
            told = (scales, zeros, group_of[here], None if kept is None else kept[here], grid.levels)
            native.round_columns(moved[here], errors[here], factor.upper[here, here], *told)
            continue
        for j in range(start, min(start + leaf, width)):
            now, scale, zero = moved[j], scales[groups[j]], zeros[groups[j]]
            now.addmv_(errors[start:j].t(), factor.upper[start:j, j])
            steps = nearest_steps(now, grid, scale, zero)
            now.copy_(steps if kept is None else steps * kept[j])
            errors[j].addcmul_(now, scale, value=-1)
    codes = moved.to(torch.uint8) if own else nearest_codes(moved, grid, torch.ones_like(moved[0]), zeros[group_of])
    back = None if factor.order is None else factor.order.argsort()
    stay = mask if choose is None else kept.t().contiguous()
    return CompressedWeight(grid, _ordered(codes, back).t().contiguous(), *fitted, stay)


def _left(factor: Factor, moved: torch.Tensor, errors: torch.Tensor, kept: torch.Tensor, here: slice) -> torch.Tensor:
    """What columns `here` would be if those that go went and none were rounded: larger, for they make up for the others."""
    left, errors, upper = moved[here].clone(), errors[here].clone(), factor.upper[here, here]
    for j, stays in enumerate(kept[here]):
        left[j].addmv_(errors[:j].t(), upper[:j, j]).mul_(stays)
        errors[j] -= left[j]
    return left


def _ordered(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Rows in an order; none of them is moved where there is none."""
    return rows if order is None else rows[order]


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: Statistic | None = None
) -> CompressedWeight:
    """Round `weight` `[out, in]` onto the grid of the options so that the outputs for the inputs fed change least.

    Raises:
        UserError: nothing was fed, or the Hessian cannot be factorized.
    """
    if statistic is None:
        raise UserError("calibration: GPTQ needs text to compare outputs on; give the inputs of the linear")
    factor = statistic.factor(options.damp, options.act_order)
    return solve_columns(weight, factor, options.grid, options.clip, mask)
