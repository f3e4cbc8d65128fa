"""Weights on a grid: how a scale is fitted, how a float becomes a code, and what a code means."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qlib.quantize.formats import ELEMENTS, Grid

__all__ = ["Grid", "CompressedWeight", "Fit", "fit_grid", "round_to_grid", "nearest_codes", "values_of", "scale_values"]

#: The magnitudes of e2m1; a code is the sign in bit 3 and an index into these.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TINY = 2.0**-120  # stands in for a scale of zero where a power of two is asked for


class Fit(NamedTuple):
    """What a grid stores beside the codes.

    Attributes:
        scales: `[out, groups]`, in the type of the format: bf16, float8_e8m0fnu (mxfp4) or float8_e4m3fn (nvfp4).
        zeros: `[out, groups]`, the code that means 0: uint8, or bf16 where zeros are real. Unused by floats.
        tensor_scale: fp32 scalar, a factor of all scales (nvfp4), else None.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    tensor_scale: torch.Tensor | None = None


@dataclass
class CompressedWeight:
    """A linear layer's weight on a grid. `dequantize` is the one definition of its meaning.

    Attributes:
        grid: the number format.
        codes: uint8 `[out, in]`: 0 to ``grid.levels - 1``, or the bits of a float.
        scales, zeros, tensor_scale: see `Fit`.
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    tensor_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The fp32 weight `[out, in]`: (code - zero) * scale, or the number a code stands for times scale."""
        codes = self.codes.view(*self.scales.shape, -1)
        scales = scale_values(self.scales, self.tensor_scale)[..., None]
        return values_of(codes, self.grid, scales, self.zeros.float()[..., None]).view(self.codes.shape)


def scale_values(scales: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 scales as they multiply."""
    return scales.float() if tensor_scale is None else scales.float() * tensor_scale


def values_of(codes: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """fp32 numbers that uint8 codes stand for; fp32 scales and zeros are broadcast against them."""
    if grid.element == "int":
        return (codes.float() - zeros) * scales
    if grid.element == "fp8":
        return codes.view(torch.float8_e4m3fn).float() * scales
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.long()] * scales


def nearest_codes(values: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the numbers of the grid that are nearest to fp32 values; scales and zeros are broadcast.

    Ties go to the even code, as in IEEE 754.
    """
    steps = values / scales
    if grid.element == "int":
        codes = (steps + zeros).round() if grid.real_zero else steps.round() + zeros
        return codes.clamp(0, grid.levels - 1).to(torch.uint8)
    if grid.element == "fp8":
        largest = ELEMENTS["fp8"].largest
        return steps.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    middles = torch.tensor([(low + high) / 2 for low, high in zip(E2M1, E2M1[1:])], device=steps.device)
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(()))  # the upper neighbour is the even code
    return (torch.bucketize(steps.abs(), middles) + 8 * (steps < 0)).to(torch.uint8)


def fit_grid(weight: torch.Tensor, grid: Grid, tensor_scale: torch.Tensor | None = None) -> Fit:
    """Fit scale and zero of every group to its least and greatest weight (the range always holds 0).

    Args:
        weight: `[out, in]`.
        tensor_scale: of nvfp4, if it is already known from more than this weight.

    Returns:
        The fit. Scales are rounded to the type they are stored in before codes are computed from them, so that nothing
        is lost when they are stored.
    """
    grouped = weight.float().view(len(weight), grid.groups(weight.shape[1]), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return fit_range(low, high, grid, tensor_scale)


def fit_range(low: torch.Tensor, high: torch.Tensor, grid: Grid, tensor_scale: torch.Tensor | None = None) -> Fit:
    """Scale and zero of groups whose weights lie between `low` (at most 0) and `high` (at least 0), `[out, groups]`."""
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if grid.element != "int":
        return _fit_floats(high, grid, tensor_scale)
    scales = ((high - low) / (grid.levels - 1)).bfloat16()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if grid.symmetric:
        return Fit(scales, torch.full_like(scales, grid.levels // 2).to(torch.uint8))
    zeros = -low / scales.float()
    return Fit(scales, zeros.bfloat16() if grid.real_zero else zeros.round().clamp(0, grid.levels - 1).to(torch.uint8))


def _fit_floats(largest: torch.Tensor, grid: Grid, tensor_scale: torch.Tensor | None) -> Fit:
    """Scales of float formats for groups whose largest magnitudes are `largest`."""
    top, zeros = ELEMENTS[grid.element].largest, torch.zeros(largest.shape, dtype=torch.uint8, device=largest.device)
    if grid.element == "mxfp4":  # the exponent of the largest weight less that of the largest number, 4 <= 6 < 8
        exponents = torch.floor(torch.log2(largest.clamp(min=TINY))) - 2
        return Fit(torch.exp2(exponents).to(torch.float8_e8m0fnu), zeros)
    if grid.element == "nvfp4":
        if tensor_scale is None:
            tensor_scale = (largest.max() / (top * ELEMENTS["fp8"].largest)).clamp(min=TINY)
        scales = (largest / top / tensor_scale).clamp(2.0**-9, ELEMENTS["fp8"].largest).to(torch.float8_e4m3fn)
        return Fit(scales, zeros, tensor_scale)
    if grid.group_size == "tensor":
        largest = largest.max().expand_as(largest)
    scales = (largest / top).bfloat16()
    return Fit(torch.where(scales == 0, torch.ones_like(scales), scales), zeros)


def round_to_grid(
    weight: torch.Tensor,
    grid: Grid,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tensor_scale: torch.Tensor | None = None,
) -> CompressedWeight:
    """Round every weight to the nearest code of its group."""
    grouped = weight.float().view(*scales.shape, -1)
    codes = nearest_codes(grouped, grid, scale_values(scales, tensor_scale)[..., None], zeros.float()[..., None])
    return CompressedWeight(grid, codes.view(weight.shape), scales, zeros, tensor_scale)
