"""GPTQ (Frantar et al. 2022): round column by column, each time moving the columns that are left to make up for it.

For inputs X the squared error ||X (W - Q)^T||^2 of a linear is a quadratic form with Hessian H = 2 X^T X. Once a
column is rounded, the best change of all later columns has a closed form; the upper Cholesky factor of the inverse
of H holds what all these steps need, so one factorization serves all rows and all linears that read the same inputs.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from qlib.errors import UserError
from qlib.quantize.formats import GridOptions
from qlib.quantize.grid import CompressedWeight, Grid, fit_grid

__all__ = ["Options", "SCOPE", "Statistic", "Factor", "factorize", "solve_columns", "solve"]

SCOPE = "linear"

#: How much more damping is tried when the Hessian cannot be factorized.
MORE_DAMPING = (10, 100, 1000)


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a GPTQ pass, beside those of every grid.

    Args:
        damp: what is added to the diagonal of the Hessian, as a share of its mean.
        block_size: columns after which the columns further right are brought up to date; changes time, hardly results.
        act_order: start with the columns of the largest inputs; scales are then fitted before anything is rounded.
    """

    damp: float = field(default=0.01, metadata={"minimum": 0})
    block_size: Literal[32, 64, 128, 256] = 128
    act_order: bool = False


@dataclass(frozen=True)
class Factor:
    """What solving needs to know of the inputs; the same for every linear that reads them.

    Attributes:
        upper: fp32 `[in, in]`, upper Cholesky factor of the inverse of the damped Hessian, in the order of `order`.
        dead: bool `[in]`, columns whose input was always 0.
        order: int64 `[in]`, the columns in the order they are rounded; None: from left to right.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor | None = None


class Statistic:
    """The Hessian 2/n * sum x x^T of the inputs of one or several linears, and its factor once it is asked for."""

    def __init__(self, width: int, options: Options):
        self.width = width
        self.free()

    def feed(self, inputs: torch.Tensor) -> None:
        """Add inputs `[tokens, in]`. A running mean, so that the sum stays in range however much is fed."""
        if self.hessian is None:
            self.hessian = torch.zeros(self.width, self.width, device=inputs.device)
        self.hessian *= self.tokens / (self.tokens + len(inputs))
        self.tokens += len(inputs)
        scaled = math.sqrt(2 / self.tokens) * inputs.float()
        self.hessian += scaled.t() @ scaled
        self._factors = {}

    def factor(self, damp: float, act_order: bool = False) -> Factor:
        """The factor of what was fed so far, computed once.

        Raises:
            UserError: nothing was fed, or the Hessian cannot be factorized.
        """
        if self.hessian is None:
            raise UserError("calibration: no text reached a linear that GPTQ was to solve")
        if (damp, act_order) not in self._factors:
            self._factors[damp, act_order] = factorize(self.hessian, damp, act_order)
        return self._factors[damp, act_order]

    def free(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self.hessian: torch.Tensor | None = None
        self._factors: dict[tuple[float, bool], Factor] = {}


def factorize(hessian: torch.Tensor, damp: float = 0.01, act_order: bool = False) -> Factor:
    """Damp a Hessian `[in, in]`, invert it and factorize the inverse; where that fails, with more damping.

    Raises:
        UserError: inputs were not finite, or no damping helped.
    """
    if not hessian.isfinite().all():
        raise UserError("calibration: some inputs of a linear are infinite or not a number, so GPTQ cannot solve it")
    hessian = hessian.clone()
    diagonal = hessian.diagonal()  # a view
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    order = None
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
        diagonal = hessian.diagonal()
    for share in (damp, *(max(damp, 1e-4) * more for more in MORE_DAMPING)):
        damped = hessian.clone()
        damped.diagonal().add_(share * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0:
                return Factor(upper, dead, order)
    raise UserError(
        f"damp: {damp} and up to {share:g} leave the Hessian of {len(hessian)} inputs singular; "
        "allowed: more damping, or more calibration samples"
    )


def solve_columns(
    weight: torch.Tensor, factor: Factor, grid: Grid, block_size: int = 128, mask: torch.Tensor | None = None
) -> CompressedWeight:
    """Round a weight column by column (the paper's algorithm 1; in its letters: W, H^-1 = U^T U with U upper, Q, E).

    Scale and zero of a group are fitted when its first column is reached, to the weights as they then are; with an
    order they are fitted to the original weights before, because the columns of a group are then not met together.

    A weight that was pruned keeps the zero's code. What earlier columns moved into its place is handed on to those that
    are left, as in SparseGPT (Frantar and Alistarh 2023): one factor still serves all rows, whatever their masks.

    Args:
        weight: `[out, in]`, not modified.
        block_size: columns after which all columns further right are updated, in one matrix product; inside a block
            one column at a time. One of group and block size must divide the other.
        mask: bool `[out, in]`, false where a weight was pruned.
    """
    width, size = weight.shape[1], grid.group_size or weight.shape[1]
    columns = weight.float().t().contiguous()  # [in, out]: a column of the weight lies together in memory
    columns = columns.masked_fill(factor.dead[:, None], 0)
    kept = None if mask is None else mask.t()
    columns = columns if kept is None else columns.masked_fill(~kept, 0)
    scales = torch.empty(grid.groups(width), len(weight), device=weight.device)  # [groups, out]
    zeros = torch.empty_like(scales)
    if factor.order is not None:
        fitted = fit_grid(columns.t().contiguous(), grid)
        scales, zeros = fitted[0].t().float(), fitted[1].t().float()
        columns, kept = columns[factor.order], None if kept is None else kept[factor.order]
    places = list(range(width)) if factor.order is None else factor.order.tolist()
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block, upper = columns[start:stop], factor.upper[start:stop]  # views; `columns` is modified in place
        errors = torch.empty_like(block)
        for i in range(stop - start):
            group = places[start + i] // size
            if factor.order is None and (start + i) % size == 0:
                scales[group], zeros[group] = _fit(columns, kept, start + i, size, grid)
            scale, zero, now = scales[group], zeros[group], block[i]
            code = (now / scale).round_().add_(zero).clamp_(0, grid.levels - 1)
            if kept is not None:
                code = torch.where(kept[start + i], code, zero)
            codes[places[start + i]] = code
            errors[i] = (now - (code - zero) * scale) / upper[i, start + i]
            block[i + 1 :] -= torch.outer(upper[i, start + i + 1 : stop], errors[i])
        columns[stop:] -= (errors.t() @ upper[:, stop:]).t()
    return CompressedWeight(
        grid, codes.t().contiguous(), scales.t().contiguous().bfloat16(), zeros.t().contiguous().to(torch.uint8)
    )


def _fit(
    columns: torch.Tensor, kept: torch.Tensor | None, first: int, size: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros `[out]` of the group of columns that begins at `first`; pruned weights count as zero."""
    group = columns[first : first + size]
    if kept is not None:
        group = group.masked_fill(~kept[first : first + size], 0)
    scales, zeros, _ = fit_grid(group.t(), Grid(grid.bits, None, grid.symmetric))
    return scales[:, 0], zeros[:, 0]


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
    return solve_columns(weight, factor, options.grid, options.block_size, mask)
