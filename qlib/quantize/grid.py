"""Integer grids: which numbers a compressed weight can hold, and how a float weight is rounded onto them."""

from dataclasses import dataclass

import torch

from qlib.errors import UserError

__all__ = ["Grid", "CompressedWeight", "fit_grid", "round_to_grid"]


@dataclass(frozen=True)
class Grid:
    """An integer number format.

    Args:
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale and a zero; None: one group per output channel.
        symmetric: zero is the middle code; otherwise it is fitted and stored per group.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def name(self) -> str:
        """``int8`` or ``int4-g128``: what the speed records call the format."""
        return f"int{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")

    def groups(self, in_features: int) -> int:
        """Number of groups of a row.

        Raises:
            UserError: the group size does not divide `in_features`.
        """
        size = self.group_size or in_features
        if in_features % size:
            raise UserError(f"group_size {size} does not divide the {in_features} input channels of a linear")
        return in_features // size

    def bits_per_weight(self, in_features: int) -> float:
        """Bits a weight really takes: its code, and its share of a bf16 scale and, if asymmetric, of a zero code."""
        overhead = 16 + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups(in_features) / in_features


@dataclass
class CompressedWeight:
    """A linear layer's weight on a grid. `dequantize` is the one definition of its meaning.

    Attributes:
        grid: the number format.
        codes: uint8 `[out, in]`, 0 to ``grid.levels - 1``.
        scales: bf16 `[out, groups]`.
        zeros: uint8 `[out, groups]`, the code that means 0.
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The fp32 weight `[out, in]`: (code - zero) * scale."""
        out_features, in_features = self.codes.shape
        groups = self.scales.shape[1]
        codes = self.codes.view(out_features, groups, in_features // groups).float()
        weight = (codes - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return weight.view(out_features, in_features)


def fit_grid(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scale and zero of every group to its least and greatest weight (the range always holds 0).

    Args:
        weight: `[out, in]`.

    Returns:
        scales bf16 `[out, groups]` and zeros uint8 `[out, groups]`. The scale is rounded to bf16 before codes are
        computed from it, so that nothing is lost when it is stored.
    """
    out_features, in_features = weight.shape
    grouped = weight.float().view(out_features, grid.groups(in_features), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / (grid.levels - 1)).bfloat16()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if grid.symmetric:
        zeros = torch.full_like(scales, grid.levels // 2)
    else:
        zeros = (-low / scales.float()).round().clamp(0, grid.levels - 1)
    return scales, zeros.to(torch.uint8)


def round_to_grid(weight: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> CompressedWeight:
    """Round every weight to the nearest code of its group."""
    out_features, in_features = weight.shape
    grouped = weight.float().view(out_features, scales.shape[1], -1)
    codes = (grouped / scales.float()[..., None]).round() + zeros.float()[..., None]
    codes = codes.clamp(0, grid.levels - 1).to(torch.uint8).view(out_features, in_features)
    return CompressedWeight(grid, codes, scales, zeros)
