"""Grids against brute force in float64."""

import numpy as np
import pytest
import torch

from qlib.errors import UserError
from qlib.quantize import rtn
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

BITS = (2, 3, 4, 5, 6, 8)


def weight(rows=6, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def brute_force(values, grid, scale, zero):
    """The nearest representable number to each value, by trying all of them."""
    points = (np.arange(grid.levels) - zero) * np.float64(scale)
    return points[np.abs(values[:, None] - points[None]).argmin(1)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("group_size", (None, 32))
def test_every_weight_goes_to_the_nearest_point_of_its_group(bits, symmetric, group_size):
    grid, w = Grid(bits, group_size, symmetric), weight()
    scales, zeros, _ = fit_grid(w, grid)
    rounded = round_to_grid(w, grid, scales, zeros).dequantize().double().numpy()
    size = group_size or 64
    for row in range(len(w)):
        for group in range(64 // size):
            part = slice(group * size, (group + 1) * size)
            values, scale = w[row, part].double().numpy(), scales[row, group].double().item()
            nearest = brute_force(values, grid, scale, zeros[row, group].item())
            # Ties may go either way, so distances are compared and not points.
            np.testing.assert_allclose(np.abs(rounded[row, part] - values), np.abs(nearest - values), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_more_bits_smaller_groups_and_a_fitted_zero_never_lose_on_average(seed):
    w = weight(64, 128, seed) + 0.3

    def error(*grid):
        fitted = Grid(*grid)
        return (round_to_grid(w, fitted, *fit_grid(w, fitted)).dequantize() - w).double().square().mean().item()

    assert all(error(more, 32) < error(fewer, 32) for fewer, more in zip(BITS, BITS[1:]))
    for bits in BITS:
        assert error(bits, 32) <= error(bits, 64) <= error(bits, 128)
        assert error(bits, 32, False) <= error(bits, 32, True)


def test_a_group_of_zeros_stays_zero():
    w = torch.zeros(2, 64)
    for symmetric in (False, True):
        assert rtn.solve(w, rtn.Options(bits=4, group_size=32, symmetric=symmetric)).dequantize().abs().max() == 0


def test_zero_is_always_representable():
    w = weight().abs() + 5  # all positive: without zero in the range, pruned weights could not be stored
    compressed = rtn.solve(w, rtn.Options(bits=4, group_size=64))
    assert (compressed.zeros == 0).all()


def test_bits_per_weight_counts_scales_and_zeros():
    assert Grid(4, 128).bits_per_weight(1024) == 4 + (16 + 4) / 128
    assert Grid(8, None, True).bits_per_weight(1024) == 8 + 16 / 1024
    assert Grid(4, 128).name == "int4-g128" and Grid(8).name == "int8"


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="96 .*does not divide|does not divide the 64"):
        fit_grid(weight(), Grid(4, 96))
