"""Clip search: give up the largest weights of a group where the finer steps this buys are worth more.

The range of a group is chosen so that the squared error sum_i h_i (w_i - q_i)^2 of its weights is least, h_i = 1 or
the mean square of input channel i (the diagonal of GPTQ's Hessian). Limits on |w| are tried first far apart; then scale
and zero move by smaller and smaller steps to whatever is better (the pattern search of Hooke and Jeeves, 1961).
"""

import torch

from qlib.errors import UserError
from qlib.quantize.formats import ELEMENTS
from qlib.quantize.grid import Fit, Grid, fit_grid, fit_range, nearest_steps, ranges, rows_at_once, scale_values

__all__ = ["fit", "squared_errors"]

#: What the limit is multiplied with first. Scales of mxfp4 are powers of two, those of nvfp4 e4m3 numbers.
FACTORS = {
    "int": [0.84**i for i in range(11)],
    "fp8": [0.84**i for i in range(4)],  # an octave lower the same numbers come again, but for the smallest
    "mxfp4": [0.5, 2],
    "nvfp4": [0.56, 0.63, 0.69, 0.75, 0.82, 0.88, 0.94, 1.06, 1.13, 1.25, 1.38, 1.5],
}
STEPS = [0.08 / 2**i for i in range(5)]  # the first is half of what lies between two factors


def fit(
    weight: torch.Tensor,
    grid: Grid,
    clip: str,
    importance: torch.Tensor | None = None,
    tensor_scale: torch.Tensor | None = None,
) -> Fit:
    """Fit scale and zero of every group; the squared error is never above that of the whole range.

    Args:
        weight: `[out, in]`, of any float type. Scales of symmetric integers below 8 bits may come out negative: then
            the code that has no opposite stands at the positive end.
        clip: none, mse or activations, see `GridOptions`.
        importance: mean square of the inputs `[in]`, for clip activations.
        tensor_scale: of nvfp4, if it is already known from more than this weight.

    Raises:
        UserError: clip activations without importance.
    """
    start = fit_grid(weight, grid, tensor_scale)
    if clip == "none":
        return start
    if clip == "activations" and importance is None:
        raise UserError("calibration: clip activations weighs errors by the inputs of a linear, but no text reached it")
    importance = importance if clip == "activations" else None
    best = start._replace(scales=start.scales.float())
    least = squared_errors(weight, grid, best, importance)

    def attempt(scales: torch.Tensor, zeros: torch.Tensor) -> None:
        nonlocal best, least
        if start.scales.dtype == torch.float8_e4m3fn:
            scales = scales.clamp(2.0**-9, ELEMENTS["fp8"].largest)
        zeros = zeros.clamp(0, grid.levels - 1).to(start.zeros.dtype)
        trial = Fit(scales.to(start.scales.dtype).float(), zeros, start.tensor_scale)
        errors = squared_errors(weight, grid, trial, importance)
        better = errors < least  # false where a scale has become 0 and errors are not numbers
        least = torch.where(better, errors, least)
        best = trial._replace(
            scales=torch.where(better, trial.scales, best.scales), zeros=torch.where(better, zeros, best.zeros)
        )

    low, high = ranges(weight, grid)
    signs = (1, -1) if grid.element == "int" and grid.bits < 8 else (1,)
    for factor in FACTORS[grid.element]:
        if grid.has_zeros:  # cut at the limit what lies beyond it, and round the zero to either side
            limit = factor * torch.maximum(-low, high)
            cut = torch.maximum(low, -limit)
            scales = fit_range(cut, torch.minimum(high, limit), grid).scales.float()
            for zeros in ((-cut / scales).floor(), (-cut / scales).ceil()):
                attempt(scales, zeros)
        for sign in signs if grid.symmetric else ():
            attempt(start.scales.float() * (sign * factor), best.zeros)
    for step in STEPS if start.scales.dtype == torch.bfloat16 else ():
        for factor in (1 - step, 1 + step):
            attempt(best.scales * factor, best.zeros)
        for shift in (-1, 1) if grid.has_zeros else ():
            attempt(best.scales, best.zeros.float() + shift)
    return best._replace(scales=best.scales.to(start.scales.dtype))


def squared_errors(
    weight: torch.Tensor, grid: Grid, fitted: Fit, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of every group when rounded to nearest, fp32 `[out, groups]`; weighted by `importance` `[in]`.

    One scale for the whole weight makes one group of it: all entries are then the error of all.
    """
    groups, rows, parts = fitted.scales.shape[1], rows_at_once(weight), []
    factors = scale_values(fitted.scales, fitted.tensor_scale)
    for part, scales, zeros in zip(weight.split(rows), factors.split(rows), fitted.zeros.float().split(rows)):
        values = part.float().view(len(part), groups, -1)
        errors = nearest_steps(values, grid, scales[..., None], zeros[..., None]).mul_(scales[..., None]).sub_(values)
        weighted = errors if importance is None else errors * importance.float().view(groups, -1)
        parts.append(torch.linalg.vecdot(errors, weighted))
    errors = torch.cat(parts)
    return errors.sum().expand_as(errors) if grid.group_size == "tensor" else errors
