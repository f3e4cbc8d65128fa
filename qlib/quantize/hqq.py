"""HQQ, half-quadratic quantization (Badri and Shaji 2023): move the zero of every group, without any data.

The zeros z, here real numbers, minimize sum |w - s (q - z)|^p with p < 1, which forgives the few weights that are far
off. An extra variable e for the error of each weight splits this into steps with closed solutions:
    q = round(w / s + z)
    e = sign(r) max(|r| - |r|^(p-1) / beta, 0)  with  r = w - s (q - z)
    z = mean(q - (w - e) / s)  over the group
and beta, which ties e to the true error, grows from step to step. e is not 0 only for errors above beta^(1/(p-2)), 0.17
at first: where weights are smaller, as those of most language models, this is least squares whatever p is.
"""

from dataclasses import dataclass, field

import torch

from qlib.errors import UserError
from qlib.quantize import clip
from qlib.quantize.formats import Grid, GridOptions
from qlib.quantize.grid import CompressedWeight, round_to_grid, rows_at_once

__all__ = ["Options", "SCOPE", "shrink", "optimize_zeros", "solve"]

SCOPE = "linear"
KAPPA = 1.01  # what beta grows by from step to step


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of an HQQ pass, beside those of every grid.

    Args:
        p: exponent of the errors, 0 to 1.
        beta: at the start; large values forgive more.
        iterations: steps of the solver.
        round_zeros: round the zeros to codes in the end, which are smaller; nearly all that moving them gained is lost.
    """

    p: float = field(default=0.7, metadata={"minimum": 0})
    beta: float = field(default=10.0, metadata={"minimum": 0.001})
    iterations: int = field(default=20, metadata={"minimum": 1})
    round_zeros: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.element != "int":
            raise UserError(f"element: {self.element} is not allowed with hqq, it has no zero to move; allowed: int")
        if self.symmetric or self.activations:
            name = "symmetric: true" if self.symmetric else "activations: int8"
            raise UserError(f"{name} is not allowed with hqq, which moves the zero of every group; use pass rtn")
        if self.clip == "activations":
            raise UserError("clip: activations is not allowed with hqq, which reads no data; allowed: none, mse")
        if self.p > 1:
            raise UserError(f"p: {self.p:g} is not allowed; allowed: 0 to 1")

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, real_zero=not self.round_zeros)


def shrink(errors: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """The generalized soft threshold: small errors become 0, large ones come closer to it by |r|^(p-1) / beta."""
    size = errors.abs()
    return (size - size.pow(p - 1) / beta).clamp_(min=0).copysign_(errors)


def _shrinks(largest: torch.Tensor, beta: float, p: float) -> bool:
    """Whether `shrink` leaves anything of errors up to `largest`; the margin is for what rounding may do to it."""
    return not largest < 0.999 * beta ** (1 / (p - 2))


def optimize_zeros(
    weight: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor, options: Options
) -> torch.Tensor:
    """Move the zeros of groups with given scales.

    Args:
        weight: fp32 `[out, in]`. scales, zeros: fp32 `[out, groups]`.

    Returns:
        Of the zeros of all steps those with the least sum of |error|^p, group by group: never worse than at the start,
        until they are rounded to the type they are stored in.
    """
    groups, scales, zeros = weight.view(*scales.shape, -1), scales[..., None], zeros[..., None]
    steps, beta = groups / scales, options.beta
    best, least = zeros, torch.full_like(zeros, torch.inf)
    for _ in range(options.iterations + 1):
        codes = (steps + zeros).round_().clamp_(0, 2**bits - 1)
        errors = (codes - zeros).mul_(scales)
        torch.sub(groups, errors, out=errors)
        size = errors.abs()
        far = _shrinks(size.max(), beta, options.p)  # a power of every error is what takes time here
        loss = size.pow_(options.p).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, zeros, best), torch.minimum(loss, least)
        aims = (groups - shrink(errors, beta, options.p)) / scales if far else steps
        zeros = codes.sub_(aims).mean(-1, keepdim=True)
        beta *= KAPPA
    return best[..., 0]


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: None = None
) -> CompressedWeight:
    """Round `weight` `[out, in]` onto the grid of the options; where weights were pruned, zeros are whole numbers."""
    grid = options.grid
    weight = weight if mask is None else weight.masked_fill(~mask, 0)
    start = clip.fit(weight, Grid(grid.bits, grid.group_size, real_zero=True), options.clip)
    parts = zip(*(one.split(rows_at_once(weight)) for one in (weight, start.scales, start.zeros)))
    zeros = torch.cat([optimize_zeros(w.float(), grid.bits, s.float(), z.float(), options) for w, s, z in parts])
    whole = zeros.round().clamp(0, grid.levels - 1)
    if not grid.real_zero:
        return round_to_grid(weight, grid, start.scales, whole.to(torch.uint8))
    if mask is not None:  # 0 has a code only where the zero is one
        zeros = torch.where(mask.view(*zeros.shape, -1).all(-1), zeros, whole)
    return round_to_grid(weight, grid, start.scales, zeros.bfloat16())
