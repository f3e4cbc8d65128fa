"""The second moment of the inputs of linears (a Hessian), summed up from calibration text, and its factor U U^T.

`qlib.quantize.gptq` tells what the factor is for. Pruning by SparseGPT and the joint pass ask the same of their inputs.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator

import torch

from qlib.errors import UserError

__all__ = ["Statistic", "Factor", "factorize"]

#: How much more damping is tried when the Hessian cannot be factorized.
MORE_DAMPING = (10, 100, 1000)
PANEL = 256  # columns of the Hessian that are summed up at a time, from the diagonal down
PIECE = 2**20  # numbers of it that are moved at a time


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

    def __init__(self, width: int, options: Any):
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
