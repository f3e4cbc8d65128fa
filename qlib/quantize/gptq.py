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

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator

import torch

from qlib.errors import UserError
from qlib.layers import native
from qlib.quantize.clip import fit
from qlib.quantize.formats import GridOptions
from qlib.quantize.grid import CompressedWeight, Grid, nearest_codes, nearest_steps, scale_values

__all__ = ["Options", "SCOPE", "Statistic", "Factor", "factorize", "drifted", "solve_columns", "solve", "BLOCK", "LEAF"]

SCOPE = "linear"
TOGETHER = True

#: How much more damping is tried when the Hessian cannot be factorized.
MORE_DAMPING = (10, 100, 1000)
BLOCK = 128  # columns whose weights are compared with each other, where some are to go
LEAF = 16  # columns between two matrix products that hand errors on: the smallest group size, a power of two
PANEL = 256  # columns of the Hessian that are summed up at a time, from the diagonal down
PIECE = 2**20  # numbers of it that are moved at a time


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


@dataclass(frozen=True)
class Factor:
    """What solving needs to know of the inputs; the same for every linear that reads them.

    Attributes:
        upper: fp32 `[in, in]`, U_ij / U_jj of the damped Hessian U U^T, rows and columns in the order of `order`.
        pivots: fp32 `[in]`, U_jj^2: what an error of 1 costs in column j after all later columns have made up for it.
        energy: fp32 `[in]`, the mean square of each input, up to a factor.
        dead: bool `[in]`, columns whose input was always 0.
        order: int64 `[in]`, the columns in the order they are rounded; None: from left to right.
        damp: the damping it took.
    """

    upper: torch.Tensor
    pivots: torch.Tensor
    energy: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor | None = None
    damp: float = 0.0


class Statistic:
    """The Hessian sum x x^T of the inputs of one or several linears, and its factor once it is asked for.

    Attributes:
        hessian: fp32 `[in, in]`, its lower triangle, or None. Neither the number of tokens nor any other factor of it
            matters to the result.
        notes: what the record tells of every linear that was solved: the damping it took, and the dead columns.
    """

    def __init__(self, width: int, options: Options):
        self.width = width
        self.free()

    def feed(self, inputs: torch.Tensor) -> None:
        """Add inputs `[tokens, in]`."""
        if self.hessian is None:
            self.hessian = torch.zeros(self.width, self.width, device=inputs.device)
        self._factors = {}
        x = inputs.float()
        with _bf16_products(inputs.dtype == torch.bfloat16):
            for start in range(0, self.width, PANEL):
                panel = slice(start, start + PANEL)
                self.hessian[start:, panel] += x[:, start:].t() @ x[:, panel]

    def factor(self, damp: float, act_order: bool = False) -> Factor:
        """The factor of what was fed so far, computed once.

        Raises:
            UserError: nothing was fed, or the Hessian cannot be factorized.
        """
        if self.hessian is None:
            raise UserError("calibration: no text reached a linear that GPTQ was to solve")
        if (damp, act_order) not in self._factors:
            for start in range(PANEL, self.width, PANEL):  # the other triangle
                self.hessian[start - PANEL : start, start:] = self.hessian[start:, start - PANEL : start].t()
            found = factorize(self.hessian, damp, act_order)
            self._factors[damp, act_order] = found
            self.notes = {"damp": found.damp, "dead": int(found.dead.sum())}
        return self._factors[damp, act_order]

    def free(self) -> None:
        """Forget everything."""
        self.hessian: torch.Tensor | None = None
        self.notes: dict[str, Any] = {}
        self._factors: dict[tuple[float, bool], Factor] = {}


@contextmanager
def _bf16_products(allowed: bool) -> Iterator[None]:
    """Let oneDNN multiply fp32 matrices as bf16, with fp32 sums: exact for bf16 numbers, and faster."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        if allowed:
            matmul.fp32_precision = "bf16"
        yield
    finally:
        matmul.fp32_precision = before


def factorize(hessian: torch.Tensor, damp: float = 0.01, act_order: bool = False) -> Factor:
    """Damp a Hessian `[in, in]` and factorize it; where that fails, with more damping. Takes its memory once more.

    Raises:
        UserError: inputs were not finite, or no damping helped.
    """
    energy = hessian.diagonal().clone()
    if not energy.isfinite().all():  # no sum x_i x_j is larger than the larger of both sums of squares
        raise UserError("calibration: some inputs of a linear are infinite or not a number, so GPTQ cannot solve it")
    dead = energy == 0
    diagonal = energy.masked_fill(dead, 1)
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    for share in (damp, *(max(damp, 1e-4) * more for more in MORE_DAMPING)):
        damped = _backwards(hessian, order)
        added = diagonal if order is None else diagonal[order]
        damped.diagonal().copy_(added.flip(0) + share * diagonal.mean())
        columns = damped.t()  # how LAPACK wants it, so that it works in place; the matrix is symmetric
        _, failed = torch.linalg.cholesky_ex(columns, out=(columns, torch.empty(0, dtype=torch.int32, device=damped.device)))
        if failed == 0:
            _reverse(damped)
            upper = damped.t()
            diagonal = upper.diagonal().clone()
            upper /= diagonal
            return Factor(upper, diagonal.square(), energy, dead, order, share)
        del damped, columns
    raise UserError(
        f"damp: {damp} and up to {share:g} leave the Hessian of {len(hessian)} inputs singular; "
        "allowed: more damping, or more calibration samples"
    )


def _backwards(hessian: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """A copy read from its end, because the factor L L^T of a matrix read backwards is the factor U U^T of the matrix."""
    if order is None:
        return hessian.flip(0, 1)
    backwards = order.flip(0)
    copy = hessian[backwards]
    for rows in copy.split(PANEL):
        rows.copy_(rows[:, backwards])
    return copy


def _reverse(matrix: torch.Tensor) -> None:
    """Turn a contiguous matrix by 180 degrees, in place."""
    flat = matrix.view(-1)
    for start in range(0, len(flat) // 2, PIECE):
        size = min(PIECE, len(flat) // 2 - start)
        first, last = flat[start : start + size], flat[len(flat) - start - size : len(flat) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


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
