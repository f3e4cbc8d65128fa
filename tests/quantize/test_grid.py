"""Every number format against an enumeration of all its codes in float64, and against its specification."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.errors import UserError
from qlib.quantize.formats import ELEMENTS, GridOptions
from qlib.quantize.grid import Grid, fit_grid, nearest_codes, nearest_steps, round_to_grid, scale_values

BITS = (2, 3, 4, 5, 6, 8)
INTEGERS = [Grid(b, g, s) for b in BITS for g in (None, 32, 64) for s in (False, True)]
REAL_ZEROS = [Grid(b, 32, real_zero=True) for b in (2, 3, 4, 8)]
FLOATS = [
    Grid(8, None, True, "fp8"), Grid(8, "tensor", True, "fp8"), Grid(4, 32, True, "mxfp4"), Grid(4, 16, True, "nvfp4")
]  # fmt: skip
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def e4m3(code):
    """The number a code of e4m3 stands for, by its bits: sign, exponent with bias 7, three bits of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return np.nan if code & 127 == 127 else (-size if sign else size)


def numbers(grid, zero=0.0):
    """What each code of a grid stands for in units of the scale, float64."""
    if grid.element == "int":
        return np.arange(grid.levels) - zero
    return np.array([e4m3(code) for code in range(256)] if grid.element == "fp8" else E2M1 + [-x for x in E2M1])


def weight(rows=6, columns=64, seed=0, size=1.0):
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(INTEGERS + REAL_ZEROS + FLOATS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**30),
    st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_every_weight_goes_to_the_nearest_number_of_its_group(grid, rows, groups, seed, size, dtype):
    w = weight(rows, 64 * groups, seed, size).to(dtype)
    compressed = round_to_grid(w, grid, *fit_grid(w, grid))
    scales = scale_values(compressed.scales, compressed.tensor_scale).double().numpy()
    assert compressed.scales.shape == (rows, grid.groups(64 * groups)) and compressed.codes.dtype == torch.uint8
    got = compressed.dequantize().double().view(*scales.shape, -1).numpy()
    codes = compressed.codes.view(*scales.shape, -1).numpy()
    values = w.double().view(*scales.shape, -1).numpy()
    for at in np.ndindex(scales.shape):
        points = numbers(grid, compressed.zeros[at].double().item()) * scales[at]
        np.testing.assert_allclose(got[at], points[codes[at]], rtol=1e-6)  # a code means what the table says
        nearest = np.nanmin(np.abs(values[at][:, None] - points), axis=1)
        # Ties may go either way, so distances are compared and not points.
        np.testing.assert_allclose(np.abs(got[at] - values[at]), nearest, atol=1e-6 * np.nanmax(np.abs(points)))


@pytest.mark.parametrize("grid", FLOATS[1:3], ids=lambda grid: grid.name)
def test_floats_round_as_ieee_754_does_and_saturate(grid):
    """All bf16 numbers up to twice the largest, and all middles, where ties go to the even code."""
    x = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x <= 2 * ELEMENTS[grid.element].largest]
    steps = nearest_steps(torch.cat([x, -x]), grid, torch.ones(()), torch.zeros(()))
    codes = nearest_codes(torch.cat([x, -x]), grid, torch.ones(()), torch.zeros(()))
    points = numbers(grid)[:128] if grid.element == "fp8" else numbers(grid)[:8]
    away = np.abs(x.double().numpy()[:, None] - points)
    away = np.where(np.isnan(away), np.inf, away)
    least = away.min(1, keepdims=True)
    even = np.where(away == least, np.arange(len(points)) % 2 + np.arange(len(points)) / 1e3, np.inf).argmin(1)
    np.testing.assert_array_equal(steps.abs().numpy(), np.tile(points[even], 2))
    np.testing.assert_array_equal(codes.numpy() % len(points), np.tile(even, 2))
    if grid.element == "fp8":  # the processor's own conversion, where it does not overflow
        torch_says = x.clamp(max=448).to(torch.float8_e4m3fn).float()
        assert torch.equal(steps[: len(x)], torch_says) and torch.equal(steps[len(x) :], -torch_says)


@pytest.mark.parametrize("largest", [1.0, 1.5, 1.99999994, 2.0, 3.999999, 4.0, 6.0, 7.5, 1e-3, 3e-30, 2.0**100])
def test_a_scale_of_mxfp4_is_the_power_of_two_of_the_specification(largest):
    """OCP Microscaling 1.0, 6.3: the largest power of two in the block over that of the format, which is 4."""
    w = torch.zeros(1, 32)
    w[0, 3] = -largest
    fitted = fit_grid(w, Grid(4, 32, True, "mxfp4"))
    exponent = np.frexp(np.float32(largest))[1] - 1
    assert fitted.scales.dtype == torch.float8_e8m0fnu and fitted.tensor_scale is None
    assert fitted.scales.float().item() == 2.0 ** (exponent - 2)
    assert fitted.scales.view(torch.uint8).item() == exponent - 2 + 127
    got = round_to_grid(w, Grid(4, 32, True, "mxfp4"), *fitted).dequantize()[0, 3].item()
    assert got == -min(6.0, min(E2M1, key=lambda x: abs(x * 2.0 ** (exponent - 2) - largest))) * 2.0 ** (exponent - 2)


def test_a_scale_of_nvfp4_is_an_e4m3_number_times_one_factor():
    w = weight(4, 64) * torch.logspace(-3, 1, 4)[:, None]
    fitted = fit_grid(w, Grid(4, 16, True, "nvfp4"))
    factor = fitted.tensor_scale
    assert fitted.scales.dtype == torch.float8_e4m3fn and factor.dtype == torch.float32 and factor.shape == ()
    assert factor.item() == pytest.approx(w.abs().max().item() / (6 * 448), rel=1e-6)
    wanted = (w.view(4, 4, 16).abs().amax(-1).double() / 6 / factor.double()).numpy()
    table = np.array([e4m3(code) for code in range(1, 127)])
    nearest = np.abs(wanted[..., None] - table).min(-1)
    np.testing.assert_allclose(np.abs(fitted.scales.double().numpy() - wanted), nearest, atol=1e-6 * wanted.max())
    assert fitted.scales.float().max() == 448
    again = fit_grid(w[:1], Grid(4, 16, True, "nvfp4"), factor)  # a part of a weight whose factor is known
    assert torch.equal(again.scales.float(), fitted.scales[:1].float())


def test_one_scale_serves_a_whole_tensor_of_fp8():
    w = weight(3, 20)
    scales = fit_grid(w, Grid(8, "tensor", True, "fp8")).scales
    assert scales.shape == (3, 1) and scales.dtype == torch.bfloat16
    assert (scales == (w.abs().max() / 448).bfloat16()).all()


@pytest.mark.parametrize("grid", INTEGERS[::5] + REAL_ZEROS + FLOATS, ids=lambda grid: grid.name)
def test_groups_of_zeros_stay_zero_and_tiny_ones_finite(grid):
    w = weight(4, 64)
    w[1:] = 0
    got = round_to_grid(w, grid, *fit_grid(w, grid)).dequantize()
    assert (got[1:] == 0).all() and got.isfinite().all() and got[0].any()
    for tiny in (0.0, 1e-38, 1e-30):
        small = torch.full((2, 64), tiny)
        got = round_to_grid(small, grid, *fit_grid(small, grid)).dequantize()
        assert got.isfinite().all() and (got - small).abs().max() <= max(tiny, 1e-30)


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


def test_zero_is_always_representable():
    w = weight().abs() + 5  # all positive: without zero in the range, pruned weights could not be stored
    assert (fit_grid(w, Grid(4, 64)).zeros == 0).all()


def test_bits_per_weight_counts_scales_and_zeros():
    assert Grid(4, 128).bits_per_weight(1024) == 4 + (16 + 4) / 128
    assert Grid(4, 64, real_zero=True).bits_per_weight(1024) == 4 + 32 / 64
    assert Grid(8, None, True).bits_per_weight(1024) == 8 + 16 / 1024
    assert [grid.bits_per_weight(1024, 256) for grid in FLOATS] == [8 + 16 / 1024, 8 + 16 / 2**18, 4.25, 4.5]
    assert Grid(4, 128).name == "int4-g128" and Grid(8).name == "int8"
    assert [grid.name for grid in FLOATS] == ["fp8", "fp8-tensor", "mxfp4", "nvfp4"]


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="96 .*does not divide|does not divide the 64"):
        fit_grid(weight(), Grid(4, 96))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"element": "fp8"}, "^bits: 4 is not allowed"),
        ({"element": "fp8", "bits": 8}, "^group_size: 128 is not allowed"),
        ({"group_size": "tensor"}, "^group_size: tensor is allowed with element fp8"),
        ({"activations": "int8"}, "^activations: int8 is allowed only"),
        ({"activations": "fp8"}, "^activations: fp8 is not allowed with element int; allowed with element fp8 only"),
    ],
)
def test_formats_that_do_not_exist_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GridOptions(**options)
    assert GridOptions(element="mxfp4").grid == Grid(4, 32, True, "mxfp4")
    assert GridOptions(bits=8, group_size=None, element="fp8", activations="fp8").grid.name == "fp8-a8"
