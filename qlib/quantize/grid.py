"""Weights on a grid: how a scale is fitted, how a float becomes a code, and what a code means."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qlib.quantize.formats import ELEMENTS, Grid

__all__ = [
    "Grid", "CompressedWeight", "Fit", "fit_grid", "fit_range", "ranges", "round_to_grid", "nearest_steps",
    "nearest_codes", "values_of", "scale_values", "rows_at_once",
]  # fmt: skip

#: The magnitudes of e2m1; a code is the sign in bit 3 and an index into these.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TINY = 2.0**-120  # stands in for a scale of zero where a power of two is asked for
SLICE = 2**17  # weights, see `rows_at_once`


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
        mask: bool `[out, in]`, false where a weight was pruned: its code is the one that means 0. None: none was.
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    tensor_scale: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def rows(self, part: slice) -> "CompressedWeight":
        """Some output channels. The scale of the whole is copied: layers that share memory cannot be saved."""
        factor = None if self.tensor_scale is None else self.tensor_scale.clone()
        mask = None if self.mask is None else self.mask[part]
        return CompressedWeight(self.grid, self.codes[part], self.scales[part], self.zeros[part], factor, mask)

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
        return codes.float().sub_(zeros).mul_(scales)
    if grid.element == "fp8":
        return codes.view(torch.float8_e4m3fn).float().mul_(scales)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.int()] * scales


def nearest_steps(values: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The numbers of the grid nearest to fp32 values, in fp32 and in units of the scale: times scale, they are weights.

    Ties of floats go to the even code, as in IEEE 754. Scales and zeros, fp32, are broadcast against values.
    """
    if grid.element == "int":
        return _integer_codes(values, grid, scales, zeros).sub_(zeros)
    steps = values / scales
    element = ELEMENTS[grid.element]
    steps.clamp_(-element.largest, element.largest)
    power = steps.abs().clamp_(min=element.normal).view(torch.int32)  # of two, at most the number: its exponent alone
    spacing = power.bitwise_and_(0x7F800000).view(torch.float32).mul_(2.0**-element.mantissa)
    return steps.div_(spacing).round_().mul_(spacing)


def _integer_codes(values: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Codes of integers as whole fp32 numbers; a zero that is no code of its own is added before rounding."""
    steps = values / scales
    steps = steps.add_(zeros).round_() if grid.real_zero else steps.round_().add_(zeros)
    return steps.clamp_(0, grid.levels - 1)


def nearest_codes(values: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the numbers of the grid that are nearest to fp32 values; fp32 scales and zeros are broadcast."""
    if grid.element == "int":
        return _integer_codes(values, grid, scales, zeros).to(torch.uint8)
    steps = nearest_steps(values, grid, scales, zeros)
    if grid.element == "fp8":
        return steps.to(torch.float8_e4m3fn).view(torch.uint8)
    size = steps.abs()
    index = torch.minimum(torch.minimum(2 * size, size + 2), size / 2 + 4)  # of E2M1: each octave has half the slope
    return (index + 8 * (steps < 0)).to(torch.uint8)


def fit_grid(weight: torch.Tensor, grid: Grid, tensor_scale: torch.Tensor | None = None) -> Fit:
    """Fit scale and zero of every group to its least and greatest weight (the range always holds 0).

    Args:
        weight: `[out, in]`.
        tensor_scale: of nvfp4, if it is already known from more than this weight.

    Returns:
        The fit. Scales are rounded to the type they are stored in before codes are computed from them, so that nothing
        is lost when they are stored.
    """
    return fit_range(*ranges(weight, grid), grid, tensor_scale)


def ranges(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest weight of every group, and 0 if that lies outside of them; fp32 `[out, groups]` each."""
    if _native().takes(weight, torch.bfloat16):
        return _native().ranges(weight, grid.groups(weight.shape[1]))
    groups = weight.view(len(weight), grid.groups(weight.shape[1]), -1)
    return groups.amin(-1).float().clamp(max=0), groups.amax(-1).float().clamp(min=0)


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
        exponents = torch.frexp(largest.clamp(min=TINY)).exponent - 3  # frexp: 0.5 <= mantissa < 1
        return Fit(torch.ldexp(torch.ones_like(largest), exponents).to(torch.float8_e8m0fnu), zeros)
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
    if grid.element == "int" and _native().takes(weight, torch.bfloat16):
        codes = _native().codes(weight, scales.float(), zeros.float(), grid.levels, grid.real_zero)
        return CompressedWeight(grid, codes, scales, zeros, tensor_scale)
    codes, rows = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), rows_at_once(weight)
    factors, zero = scale_values(scales, tensor_scale)[..., None], zeros.float()[..., None]
    for part, found, *fitted in zip(weight.split(rows), codes.split(rows), factors.split(rows), zero.split(rows)):
        found.copy_(nearest_codes(part.float().view(len(part), scales.shape[1], -1), grid, *fitted).flatten(1))
    return CompressedWeight(grid, codes, scales, zeros, tensor_scale)


def _native():
    """Kernels of the same: qlib.layers builds on this module, so they are asked for late."""
    from qlib.layers import native_rounding

    return native_rounding


def rows_at_once(weight: torch.Tensor) -> int:
    """Rows of a weight `[out, in]` to work on together: on a CPU, what is done to them must fit a core's cache."""
    return max(1, SLICE * (1 if weight.device.type == "cpu" else 64) // weight.shape[1])
